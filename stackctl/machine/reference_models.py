"""Bases of well-known sizes, to tell what a machine can do before any is downloaded.

Shapes are those of the published configurations: SmolLM2-135M, Llama-3.2-1B and 3B, Llama-3.1-8B and 70B, Qwen3-14B
and 32B.
"""

from __future__ import annotations

from dataclasses import dataclass

from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.target_modules import expand_modules, expected_targets
from stackctl.machine.memory_estimate import LargestBatch, NewAdapter, Precision, Surroundings, estimate_memory

TOKENS = 1024
RANK = 16
_RUNNING = 1.15
"""What a loaded model takes of its own bytes; benchmarks/generation.py measures it."""
_BYTES: dict[Precision, float] = {"float32": 4, "autocast": 4, "half": 2, "nf4": 0.6}


@dataclass(frozen=True)
class Size:
    """A Llama-like model. ``queries`` and ``keys`` are the widths that attention projects to."""

    name: str
    layers: int
    hidden: int
    feedforward: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool = False

    def base(self) -> Base:
        """As an entry of a registry would describe it."""
        shapes = {
            "self_attn.q_proj": (self.queries, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.queries),
            "mlp.gate_proj": (self.feedforward, self.hidden),
            "mlp.up_proj": (self.feedforward, self.hidden),
            "mlp.down_proj": (self.hidden, self.feedforward),
        }
        modules = {
            f"model.layers.{{0-{self.layers - 1}}}.{name}": ModuleShape(type="Linear", shape=list(shape))
            for name, shape in shapes.items()
        }
        vocabulary = [self.vocabulary, self.hidden]
        modules |= {
            "model.embed_tokens": ModuleShape(type="Embedding", shape=vocabulary),
            "lm_head": ModuleShape(type="Linear", shape=vocabulary),
        }
        linear = self.layers * sum(rows * columns for rows, columns in shapes.values())
        return Base(
            name=self.name, kind="hub", source=self.name, fingerprint="", architecture="LlamaForCausalLM",
            parameters=linear + self.vocabulary * self.hidden * (1 if self.tied else 2), dtype="bfloat16",
            vocabulary_size=self.vocabulary, tied_embeddings=self.tied, input_embedding="model.embed_tokens",
            output_embedding="lm_head", modules=modules,
        )  # fmt: skip


SIZES = (
    Size("135M", 30, 576, 1536, 576, 192, 49152, tied=True),
    Size("1B", 16, 2048, 8192, 2048, 512, 128256, tied=True),
    Size("3B", 28, 3072, 8192, 3072, 1024, 128256, tied=True),
    Size("8B", 32, 4096, 14336, 4096, 1024, 128256),
    Size("14B", 40, 5120, 17408, 5120, 1024, 151936),
    Size("32B", 64, 5120, 25600, 8192, 1024, 151936),
    Size("70B", 80, 8192, 28672, 8192, 1024, 128256),
)


def needs(base: Base, running: Precision, training: Precision) -> dict[str, int]:
    """Bytes that a base needs in two precisions: of memory to ``generate`` with, and to ``train`` rank 16 on one record
    of 1,024 tokens at a time, activations computed again instead of kept; of disk to ``export`` it whole.
    """
    targets = expected_targets({"target_modules": "all-linear"}, expand_modules(base.modules), "lm_head") or set()
    batch = LargestBatch(TOKENS, TOKENS, checkpointing=True)
    memory = estimate_memory(base, NewAdapter(RANK, targets), batch, Surroundings(training))
    running_bytes = int(base.parameters * _BYTES[running] * _RUNNING)
    return {"generate": running_bytes, "train": memory.total, "export": base.parameters * 2}
