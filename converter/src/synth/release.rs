//! The types of a model's own release, which a conversion keeps, as far as `config.json` shows them.

use serde_json::Value;
use sluice_format::WeightType;

use super::layout::KindTypes;

/// The result of a conversion that keeps everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Types by kind of contents.
    pub types: KindTypes,
    /// The form from which the types follow, for people.
    pub form: &'static str,
    /// Whether the configuration names the form; otherwise it is assumed.
    pub said: bool,
}

/// The form of quantised weights.
struct Form {
    name: &'static str,
    experts: WeightType,
    dense: Dense,
}

/// Which tensors have a form in addition to routed experts.
enum Dense {
    /// Attention and feed-forward networks, not the head.
    Most,
    /// Like `Most`, in another type.
    Of(WeightType),
    /// The head and the embedding too.
    All,
    /// Nothing.
    None,
}

/// Reads a `config.json` that has been validated.
pub(super) fn read(config: &Value) -> Release {
    let text = config.get("text_config").unwrap_or(&Value::Null);
    let find = |key: &str| [text, config].into_iter().find_map(|c| c.get(key).filter(|v| !v.is_null()));
    // The key of transformers 5 is `dtype`.
    let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| find(key)?.as_str());
    let (plain, name) = match dtype {
        Some("float32") => (WeightType::F32, "f32"),
        Some("float16") => (WeightType::F16, "f16"),
        _ => (WeightType::Bf16, "bf16"),
    };
    let mlx = find("quantization").filter(|q| q.get("group_size").is_some());
    let quantised = mlx.map(mlx_form).or_else(|| find("quantization_config").and_then(form));
    // DeepSeek-V4: experts have another form than the rest.
    let fp4 = find("expert_dtype").and_then(Value::as_str) == Some("fp4");
    let quantised = quantised.map(|form| match fp4 {
        true => Form { name: "fp8 with fp4 experts", experts: WeightType::Mxfp4, dense: Dense::Of(form.experts) },
        false => form,
    });
    let Some(form) = quantised else {
        let types = KindTypes { experts: plain, dense: plain, head: plain, plain };
        return Release { types, form: name, said: dtype.is_some() };
    };
    let (dense, head) = match form.dense {
        Dense::None => (plain, plain),
        Dense::Most => (form.experts, plain),
        Dense::Of(dense) => (dense, plain),
        Dense::All => (form.experts, form.experts),
    };
    // An embedding of codes becomes f32, which holds their values.
    let plain = if matches!(form.dense, Dense::All) { WeightType::F32 } else { plain };
    Release { types: KindTypes { experts: form.experts, dense, head, plain }, form: form.name, said: true }
}

fn mlx_form(quantization: &Value) -> Form {
    match quantization.get("mode").and_then(Value::as_str) {
        Some("mxfp4") => Form { name: "MLX mxfp4", experts: WeightType::Mxfp4, dense: Dense::All },
        _ => Form { name: "MLX, widened to f32", experts: WeightType::F32, dense: Dense::All },
    }
}

fn form(quantization: &Value) -> Option<Form> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_ascii_lowercase);
    let method = text(quantization, "quant_method")?;
    let widened = |name| Some(Form { name, experts: WeightType::F32, dense: Dense::Most });
    match method.as_str() {
        "fp8" => Some(Form { name: "fp8", experts: WeightType::Fp8, dense: Dense::Most }),
        "mxfp4" => Some(Form { name: "mxfp4", experts: WeightType::Mxfp4, dense: Dense::None }),
        "awq" => widened("AWQ, widened to f32"),
        "gptq" => widened("GPTQ, widened to f32"),
        "fbgemm_fp8" => widened("fp8 with a scale per row, widened to f32"),
        "modelopt" => {
            let inner = quantization.get("quantization").unwrap_or(quantization);
            match text(inner, "quant_algo").or_else(|| text(quantization, "quant_algo")).as_deref() {
                Some("fp8") => Some(Form { name: "fp8", experts: WeightType::Fp8, dense: Dense::Most }),
                _ => widened("NVFP4, widened to f32"),
            }
        }
        "compressed-tensors" => compressed(quantization),
        _ => None,
    }
}

fn compressed(quantization: &Value) -> Option<Form> {
    let groups = quantization.get("config_groups")?.as_object()?;
    let weights = groups.values().next()?.get("weights")?;
    let of = |key: &str| weights.get(key).and_then(Value::as_str);
    let bits = weights.get("num_bits").and_then(Value::as_u64);
    let ignored = quantization.get("ignore").and_then(Value::as_array);
    let attention =
        ignored.is_some_and(|list| list.iter().any(|i| i.as_str().is_some_and(|i| i.contains("self_attn"))));
    let dense = if attention { Dense::None } else { Dense::Most };
    let (name, experts) = match (of("type"), bits, of("strategy")) {
        (Some("int"), Some(4), Some("group")) => ("int4", WeightType::Int4),
        (Some("float"), Some(8), Some("tensor" | "block")) => ("fp8", WeightType::Fp8),
        (Some("float"), Some(8), _) => ("fp8 with a scale per row, widened to f32", WeightType::F32),
        (Some("float"), Some(4), _) if weights.get("group_size").and_then(Value::as_u64) == Some(32) => {
            ("mxfp4", WeightType::Mxfp4)
        }
        _ => ("compressed-tensors, widened to f32", WeightType::F32),
    };
    Some(Form { name, experts, dense })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn forms_of_published_configurations() {
        use WeightType::{Bf16, F16, F32, Fp8, Int4, Mxfp4};
        let kimi = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "type": "int"}}},
            "ignore": ["lm_head", "re:.*self_attn.*"]});
        for (config, experts, dense, head, said) in [
            (json!({}), Bf16, Bf16, Bf16, false),
            (json!({"torch_dtype": "float16"}), F16, F16, F16, true),
            (json!({"dtype": "float32"}), F32, F32, F32, true),
            (json!({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "FP8"}}), Fp8, Fp8, Bf16, true),
            (json!({"quantization_config": {"quant_method": "mxfp4"}}), Mxfp4, Bf16, Bf16, true),
            (json!({"quantization_config": {}}), Bf16, Bf16, Bf16, false),
            (json!({"quantization_config": {"quant_method": "gptq"}, "torch_dtype": "float16"}), F32, F32, F16, true),
            (json!({"text_config": {"dtype": "bfloat16", "quantization_config": kimi}}), Int4, Bf16, Bf16, true),
            (json!({"quantization": {"group_size": 64, "bits": 4}}), F32, F32, F32, true),
        ] {
            let found = read(&config);
            let types = found.types;
            assert_eq!((types.experts, types.dense, types.head, found.said), (experts, dense, head, said), "{config}");
        }
    }
}
