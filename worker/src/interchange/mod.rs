//! The layout of the published Ouro checkpoints on Hugging Face (LOOPLM §7), written and read.
//!
//! ```text
//! config.json  generation_config.json          sizes, loop steps, RoPE base: `Card`, checked key by key when read
//! model.safetensors, or model-00001-of-N.safetensors and model.safetensors.index.json
//! tokenizer.json  tokenizer_config.json  special_tokens_map.json          when the run has a tokenizer
//! README.md                                    where the weights come from
//! ```
//! Weights are fp32 here; bf16 out of them rounds to nearest even, and read back they are exact. So what was written,
//! read and written again is the same bytes.

mod export;
mod import;

use anello_configs::Model;
use serde_json::{Map, Value, json};

pub use export::{Export, Exported, export};
pub use import::{is_published_layout, published_model, published_use, read};

/// What names the model's sizes in `config.json`.
const CONFIG_JSON: &str = "config.json";
/// Which file holds which tensor, when there are several.
const INDEX_JSON: &str = "model.safetensors.index.json";
/// The only file of weights, when there is one.
const SINGLE: &str = "model.safetensors";

/// Ids of the special tokens (LOOPLM §1), as the published tokenizer and those trained here have them.
pub const PAD: u32 = 0;
/// `<|im_start|>`
pub const BOS: u32 = 1;
/// `<|im_end|>`
pub const EOS: u32 = 2;

/// How weights are used, which is not in them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Use {
    /// Loop steps (T).
    pub loops: u32,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// Longest sequence that they were trained on, tokens.
    pub positions: u32,
    /// Standard deviation of the initial matrices.
    pub init_std: f64,
}

/// The keys of `config.json` that follow from the model's sizes alone: what weights of one model must agree on.
fn sizes(model: &Model) -> [(&'static str, Value); 11] {
    [
        ("model_type", json!("ouro")),
        ("vocab_size", json!(model.vocab)),
        ("hidden_size", json!(model.hidden)),
        ("intermediate_size", json!(model.ffn)),
        ("num_hidden_layers", json!(model.layers)),
        ("num_attention_heads", json!(model.heads)),
        ("num_key_value_heads", json!(model.kv_heads)),
        ("rms_norm_eps", json!(model.rms_eps)),
        ("hidden_act", json!("silu")),
        ("tie_word_embeddings", json!(false)),
        ("head_dim", json!(model.hidden / model.heads)),
    ]
}

/// `config.json` of weights of `model`.
fn config_json(model: &Model, used: &Use, dtype: &str) -> Value {
    // The code that runs the weights is the published one's, fetched from where it is published.
    let code = |module: &str| format!("ByteDance/Ouro-1.4B--{module}");
    let mut keys: Map<String, Value> =
        sizes(model).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let rest = json!({
        "architectures": ["OuroForCausalLM"],
        "auto_map": {
            "AutoConfig": code("configuration_ouro.OuroConfig"),
            "AutoModel": code("modeling_ouro.OuroModel"),
            "AutoModelForCausalLM": code("modeling_ouro.OuroForCausalLM"),
        },
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "early_exit_threshold": 1.0,
        "initializer_range": used.init_std,
        "layer_types": vec!["full_attention"; model.layers as usize],
        "max_position_embeddings": used.positions,
        "rope_scaling": null,
        "rope_theta": used.rope_base,
        "sliding_window": null,
        "torch_dtype": dtype,
        "total_ut_steps": used.loops,
        "use_cache": true,
        "use_sliding_window": false,
    });
    keys.extend(rest.as_object().cloned().unwrap_or_default());
    Value::Object(keys)
}
