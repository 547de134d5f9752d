"""LoRA adapters of whole models: what a model changes of its base model, at a low rank."""

from shardmerge.extract.choice import Wanted
from shardmerge.extract.lora import extract_lora
from shardmerge.extract.report import Extracted

__all__ = ["Extracted", "Wanted", "extract_lora"]
