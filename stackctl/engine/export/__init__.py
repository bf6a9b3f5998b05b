"""Carry out a plan as files for other programs: streaming, read back, moved into place in one rename."""

from stackctl.engine.export.model import export_model
from stackctl.engine.export.peft import export_peft

__all__ = ["export_model", "export_peft"]
