"""What PEFT itself injects and saves is the truth: targets, ranks, scalings, names and shapes of tensors."""

import functools
import itertools
import warnings

import pytest
import torch
import transformers
from checkpoints import FINGERPRINT
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from tiny import save_adapter
from transformers.pytorch_utils import Conv1D

from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.lora.target_modules import compact_modules, expand_modules, expected_targets, lora_rank, lora_scaling
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}
LLAMA = SMALL | {"intermediate_size": 24, "num_hidden_layers": 3, "num_key_value_heads": 1}


def _llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": False} | changes))


MODELS = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-biased": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-12": lambda: _llama(num_hidden_layers=12),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=3, n_positions=32)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=8)),
    "phi": lambda: transformers.PhiForCausalLM(
        transformers.PhiConfig(**SMALL, intermediate_size=24, num_hidden_layers=2, tie_word_embeddings=False)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=2)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=24, num_hidden_layers=2, word_embed_proj_dim=16)
    ),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]()


@functools.cache
def base_of(name):
    """A base's entry by walking the plain model, in the registry's compact notation and back."""
    model = make(name)
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            modules[path] = ModuleShape(type="Linear", shape=list(module.weight.shape))
        elif isinstance(module, Conv1D):
            modules[path] = ModuleShape(type="Conv1D", shape=list(module.weight.T.shape))
        elif isinstance(module, torch.nn.Embedding):
            modules[path] = ModuleShape(type="Embedding", shape=list(module.weight.shape))
        elif path.endswith(".experts"):
            for own, parameter in module.named_parameters(recurse=False):
                modules[f"{path}.{own}"] = ModuleShape(type="Experts", shape=list(parameter.shape))
        elif path.endswith(".mlp.gate"):  # a router
            modules[path] = ModuleShape(type="Matrix", shape=list(module.weight.shape))
    head = next((path for path, module in model.named_modules() if module is model.get_output_embeddings()), None)
    compact = compact_modules(modules)
    assert expand_modules(compact) == modules
    return Base(
        name="tiny", kind="folder", source=name, fingerprint=FINGERPRINT, architecture=type(model).__name__,
        parameters=1, dtype="float32", vocabulary_size=40, output_embedding=head, modules=compact,
        tied_embeddings=name.endswith("-tied"),
    )  # fmt: skip


LLAMA_CONFIGS = {
    "one": {"target_modules": ["q_proj"]},
    "many": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "All-Linear"},
    "regex": {"target_modules": r".*layers\.[02]\..*\.(q|v)_proj"},
    "regex with an alternative": {"target_modules": r"model\.layers\.1\.mlp\.up_proj|.*k_proj"},
    "regex for everything": {"target_modules": r".*_proj"},
    "longer endings": {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    "a full name": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "parts of words": {"target_modules": ["proj", "q_proj"]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "excluded by full name": {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "excluded by ending": {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    "excluded by regex": {"target_modules": "all-linear", "exclude_modules": r".*\.(k|v)_proj"},
    "excluded from all-linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "a layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layer zero": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers with a pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers with patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h",
    "layers"]},
    "layers with a regex": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "lay.*"},
    "layers with an empty pattern": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": []},
    "layers and a full name": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]
    },
    "layers and the head": {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [0]},
    "rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}},
    "rank pattern by layer": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "v_proj": 1}
    },
    "rank pattern with anchors": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^model.layers.1.self_attn.v_proj": 6}
    },
    "rank pattern by full name": {"target_modules": ["q_proj"], "rank_pattern": {"model.layers.1.self_attn.q_proj": 6}},
    "rank pattern for a part of a word": {"target_modules": ["q_proj"], "rank_pattern": {"proj": 6, "attn": 2}},
    "rank patterns that overlap": {"target_modules": ["q_proj"], "rank_pattern": {r"0\..*q_proj": 6, r".*q_proj": 2}},
    "rank pattern with a class": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"[qk]_proj": 6}},
    "rank pattern with an alternative": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj|k_proj": 6}},
    "alpha pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 32, r".*\.2\..*v_proj": 3}},
    "both patterns": {
        "target_modules": "all-linear", "rank_pattern": {"mlp.up_proj": 2, "q_proj": 1}, "alpha_pattern": {"q_proj": 5}
    },
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 5},
    "rslora with patterns": {
        "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 7},
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings by regex": {"target_modules": r".*(q_proj|embed_tokens)"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 2}},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a saved head that is a target too": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "all-linear and a saved head": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "a saved norm": {"target_modules": "all-linear", "modules_to_save": ["norm", "input_layernorm"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a saved parent": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora biases": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "velora": {"target_modules": ["q_proj"], "velora_config": {"num_groups": 4}},
}  # fmt: skip
GPT2_CONFIGS = {
    "list": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "both projections": {"target_modules": ["c_proj", "c_fc"], "fan_in_fan_out": True},
    "one projection": {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    "all-linear": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "regex": {"target_modules": r".*h\.[01]\.attn\.c_attn", "fan_in_fan_out": True},
    "layers": {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h", "fan_in_fan_out": True},
    "embeddings": {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
    "positions": {"target_modules": ["wpe"], "fan_in_fan_out": True},
    "saved": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True},
    "bias": {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    "not declared": {"target_modules": ["c_attn"]},
    "rank pattern": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "fan_in_fan_out": True},
}
CONFIGS = {
    "llama": LLAMA_CONFIGS,
    "llama-tied": {k: LLAMA_CONFIGS[k] for k in ("all-linear", "embeddings", "head", "embeddings and head",
    "saved embeddings")}
    | {
        "tied embeddings": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        "tied saved embeddings": {
            "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True
        },
    },
    "llama-biased": {k: LLAMA_CONFIGS[k] for k in ("all-linear", "all biases", "lora biases", "a saved parent")},
    "llama-12": {k: LLAMA_CONFIGS[k] for k in ("all-linear", "layers", "longer endings", "rank pattern by layer",
    "a saved parent")}
    | {
        "one of the tens": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        "full names of one kind": {
            "target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(12)],
            "exclude_modules": ["11.self_attn.q_proj"]
        },
        "very many full names": {
            "target_modules": [
                f"model.layers.{i}.{n}" for i in range(12) for n in ("self_attn.q_proj", "self_attn.v_proj",
                "mlp.up_proj")
            ]
        },
    },
    "gpt2": GPT2_CONFIGS,
    "qwen3": {k: LLAMA_CONFIGS[k] for k in ("all-linear", "many", "regex", "both patterns", "embeddings and head",
    "a saved norm")},
    "phi": {
        "all-linear": {"target_modules": "all-linear"},
        "dense": {"target_modules": ["dense", "fc1"]},
        "a head with a bias": {"target_modules": ["lm_head", "embed_tokens"]},
        "a saved head with a bias": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "biases": {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
        "biases and a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    },
    "mixtral": {
        "attention": {"target_modules": ["q_proj", "v_proj"]},
        "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    },
    "opt": {"all-linear": {"target_modules": "all-linear"}, "projections": {"target_modules": ["out_proj", "fc1"]}},
}  # fmt: skip
CASES = [(model, config) for model, configs in CONFIGS.items() for config in configs]


def inject(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(make(model), LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config))


def saved(peft_model, folder):
    """The checkpoint that PEFT writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(peft_model, folder)
    return read_checkpoint(folder)


def injected(peft_model):
    root = peft_model.base_model.model
    return {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(("model", "config"), CASES, ids=lambda value: value)
def test_targets_ranks_and_scalings_are_pefts(model, config, tmp_path):
    wanted = CONFIGS[model][config]
    peft_model = inject(model, wanted)
    layers = injected(peft_model)
    base = base_of(model)
    modules = expand_modules(base.modules)
    checkpoint = saved(peft_model, tmp_path)
    for configuration in (wanted | {"r": 4, "lora_alpha": 6} | wanted, checkpoint.config):
        if "ensure_weight_tying" not in wanted:
            assert expected_targets(configuration, modules, base.output_embedding) == set(layers)
        for name, layer in layers.items():
            if configuration is checkpoint.config and config == "rank patterns that overlap":
                continue  # PEFT sorts the keys on saving, and then cannot load the result itself
            assert lora_rank(configuration, name) == layer.r["default"]
            assert lora_scaling(configuration, name) == pytest.approx(layer.scaling["default"], rel=1e-12)
    for name, pair in checkpoint.pairs.items():
        assert set(pair) == {"A", "B"}
        layer = layers[name]
        is_embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
        a = layer.lora_embedding_A["default"] if is_embedding else layer.lora_A["default"].weight
        b = layer.lora_embedding_B["default"] if is_embedding else layer.lora_B["default"].weight
        assert pair["A"].shape == tuple(a.shape)
        assert pair["B"].shape == tuple(b.shape)
    plan = plan_stack(base_of(model), [PlanMember("a@1", 1.0, checkpoint, "a", 1, "d", "tiny", FINGERPRINT)])
    if "ensure_weight_tying" in wanted:
        return  # refused or not, it must not be summed wrongly: see below
    if config == "rank patterns that overlap":
        assert {p.code for p in plan.errors} == {"rank"}
        return
    assert not plan.problems
    assert set(checkpoint.pairs) == set(plan.modules) == set(layers)
    trained = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    assert {r.parameter for r in plan.replacements} == trained
    for name, module in plan.modules.items():
        delta = layers[name].get_delta_weight("default")
        stored = isinstance(layers[name].get_base_layer(), Conv1D)
        assert module.shape == tuple(delta.T.shape if stored else delta.shape)


def test_weight_tying_that_reaches_two_modules_is_refused(tmp_path):
    """With ensure_weight_tying one pair of factors stands on embedding and head at once, which a plan cannot say."""
    for config in ("tied embeddings", "tied saved embeddings"):
        peft_model = inject("llama-tied", CONFIGS["llama-tied"][config])
        checkpoint = saved(peft_model, tmp_path / config)
        plan = plan_stack(base_of("llama-tied"), [PlanMember("a@1", 1.0, checkpoint, "a", 1, "d", "tiny", FINGERPRINT)])
        assert "ensure_weight_tying" in {p.code for p in plan.errors}


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "changed_base"),
    "olora": ({"init_lora_weights": "olora"}, "changed_base"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_variants_are_refused_by_name_and_only_by_it(kind, tmp_path):
    config, code = REFUSED[kind]
    peft_model = inject("llama", {"target_modules": ["q_proj"]} | config)
    checkpoint = saved(peft_model, tmp_path)
    plan = plan_stack(base_of("llama"), [PlanMember("a@1", 1.0, checkpoint, "a", 1, "d", "tiny", FINGERPRINT)])
    assert [p.code for p in plan.errors] == [code]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": "all-linear"},  # PEFT adds the experts to it of its own accord
    ],
)
def test_factors_of_experts_are_placed_by_the_parameter_that_they_are_of(config, tmp_path):
    peft_model = inject("mixtral", config)
    checkpoint = saved(peft_model, tmp_path)
    plan = plan_stack(base_of("mixtral"), [PlanMember("a@1", 1.0, checkpoint, "a", 1, "d", "tiny", FINGERPRINT)])
    assert not plan.errors
    wanted = {
        f"{name}.{layer.parameter_name}" if layer.parameter_name != "weight" else name: layer
        for name, layer in peft_model.base_model.model.named_modules()
        if isinstance(layer, ParamWrapper)
        for name in [name.replace(".base_layer", "")]
    }
    found = {name: module for name, module in plan.modules.items() if not name.endswith("_proj") or "experts" in name}
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        assert found[name].stored_shape == tuple(layer.get_param().shape)
        assert found[name].rank == layer.r["default"]
        assert found[name].factors[0].scaling == layer.scaling["default"]


def test_a_plain_config_has_no_key_that_is_unknown(tmp_path):
    """A newer PEFT adds keys: what is off must stay silent, and every key of today must be known."""
    from stackctl.plan.refusals import _HARMLESS, _REFUSED

    assert set(saved(inject("llama", {"target_modules": ["q_proj"]}), tmp_path).config) <= _HARMLESS | set(_REFUSED)


ADAPTER_NAMES = ["keys", "lora", "0", "a-b", "weight", "base_layer"]


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_raw_state_dicts_carry_the_adapters_name(name):
    from stackctl.lora.checkpoint import parse_tensor_name

    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    try:
        peft_model = get_peft_model(make("llama"), config, adapter_name=name)
    except (KeyError, ValueError, AttributeError):
        return  # a name that PEFT itself cannot bear
    raw = [key for key in peft_model.state_dict() if "lora_" in key and name in key]
    assert raw
    found = {parse_tensor_name(key) for key in raw}
    modules = {slot.module for slot in found}
    assert modules == {"model.embed_tokens", *(f"model.layers.{i}.self_attn.q_proj" for i in range(3))}
    assert len(found) == 2 * len(modules) == len(raw)


def test_every_combination_of_rules_on_twelve_layers():
    targets = [["q_proj", "up_proj"], ["model.layers.1.self_attn.q_proj", "v_proj"], ["1.mlp.up_proj", "lm_head"]]
    layers = [None, 1, [1, 11], []]
    patterns = [None, "layers", ["x", "layers"], "model"]
    exclusions = [None, ["1.self_attn.q_proj"], r".*\.1\..*", ["v_proj", "lm_head"]]
    saved = [None, ["lm_head"], ["mlp"]]
    base = base_of("llama-12")
    modules = expand_modules(base.modules)
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    for target, layer, pattern, excluded, save in itertools.product(targets, layers, patterns, exclusions, saved):
        if pattern and layer is None:
            continue
        config = {
            "target_modules": target, "layers_to_transform": layer, "layers_pattern": pattern,
            "exclude_modules": excluded, "modules_to_save": save,
        }  # fmt: skip
        peft = LoraConfig(**config)
        truth = set()
        for name in modules:
            found = check_target_module_exists(peft, name)
            if found and not isinstance(found, _ExcludedModule):
                truth.add(name)
        assert expected_targets(config, modules, base.output_embedding) == truth, config
