//! gpt-oss 20b and 120b: attention sinks, alternating windows, biases everywhere, and experts whose rows of gate and up alternate.

use sluice_format::{
    ActivationSpec, AttentionSpec, ExtentKind, FfnSpec, GqaSpec, LayerSpec, ModelSpec, MoeSpec, RouterScore,
    RouterSpec, TensorShape,
};

use super::config::Config;
use super::decoder::{Decoder, Defaults};
use super::names::Names;
use super::view::{Origin, Strides, View};
use super::{Family, Place, gqa, moe, rope};
use crate::error::ConvertError;

/// The family.
pub(crate) struct GptOss;

const DEFAULTS: Defaults = Defaults {
    vocab: 201_088,
    hidden: 2880,
    intermediate: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_eps: 1e-5,
    theta: 150_000.0,
};

const EXPERTS: moe::Defaults = moe::Defaults {
    experts: 128,
    top_k: 4,
    width: DEFAULTS.intermediate,
    shared: 0,
    groups: 1,
    groups_kept: 1,
    scale: 1.0,
};

const HEAD_DIM: usize = 64;
const WINDOW: usize = 128;
/// The factor of YaRN if the configuration does not mention the rotation: transformers 5 has it there.
const YARN_FACTOR: f64 = 32.0;
const YARN_POSITIONS: usize = 4096;
const ALPHA: f64 = 1.702;
const LIMIT: f64 = 7.0;

impl Family for GptOss {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt_oss"]
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec, ConvertError> {
        let decoder = Decoder::read(config, &DEFAULTS)?;
        let bias = config.bool_or("attention_bias", true)?;
        let mut full = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            sinks: true,
            ..gqa::read(&decoder, gqa::Heads { head_dim: Some(HEAD_DIM), ..gqa::Heads::USUAL })?
        };
        if let Some(rope) = &mut full.rope
            && !["rope_parameters", "rope_scaling"].iter().any(|key| config.has(key))
        {
            rope.scaling = rope::untruncated_yarn(YARN_FACTOR, YARN_POSITIONS);
        }
        let sliding = GqaSpec { window: gqa::window(&decoder, Some(WINDOW))?, ..full.clone() };
        let slides = decoder.layer_list("layer_types", ["sliding_attention", "full_attention"])?;
        // Without a list, layers alternate, and the first one has a window.
        let slides = slides.unwrap_or_else(|| (0..decoder.layers).map(|layer| layer % 2 == 0).collect());
        let ffn = experts(&decoder)?;
        let layer = |slides: bool| LayerSpec {
            attention: AttentionSpec::Gqa(if slides { sliding.clone() } else { full.clone() }),
            ffn: ffn.clone(),
        };
        decoder.model(slides.into_iter().map(layer).collect())
    }

    fn names(&self) -> Names {
        Names { router: "router", ..Names::USUAL }
    }

    fn origin(&self, names: Names, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let experts = spec.layers[place.layer].ffn.moe.as_ref();
        match (place.kind, experts) {
            (ExtentKind::Expert, Some(moe)) => {
                let module = names.layer(place.layer, "mlp.experts");
                expert_origin(&module, moe.experts, place.index, tensor)
            }
            _ => names.origin(spec, place, tensor),
        }
    }
}

fn experts(decoder: &Decoder<'_>) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    let routed = moe::softmax_experts(decoder, &EXPERTS, "intermediate_size", false)?;
    let biased = |moe: MoeSpec| MoeSpec {
        expert_bias: true,
        router: RouterSpec { score: RouterScore::SoftmaxOfChosen, logit_bias: true, ..moe.router },
        ..moe
    };
    let activation = ActivationSpec::SwigluOai {
        alpha: config.f64_or("swiglu_alpha", ALPHA)? as f32,
        limit: config.f64_or("swiglu_limit", LIMIT)? as f32,
    };
    Ok(FfnSpec { activation, moe: routed.moe.map(biased), ..routed })
}

/// The published MXFP4 tensors hold one output feature per row, `[experts, rows, cols]`; the bf16 form is transposed. In both, and
/// in the biases, gate has features 0, 2, …, and up 1, 3, …. In MLX's form, gate and up are separate, with one output feature per
/// row.
fn expert_origin(module: &str, experts: usize, index: usize, tensor: &TensorShape) -> Origin {
    let [_, rows, cols] = tensor.shape;
    let pair = |first: usize| {
        let name = format!("{module}.gate_up_proj");
        let start = index * 2 * rows * cols;
        let by_row = Strides { start: start + first * cols, run: rows, run_step: 0, row_step: 2 * cols, col_step: 1 };
        let by_col = Strides { start: start + first, run: rows, run_step: 0, row_step: 2, col_step: 2 * rows };
        [
            View::new(format!("{name}_blocks"), &[experts, 2 * rows, cols], by_row),
            View::new(name, &[experts, cols, 2 * rows], by_col),
        ]
    };
    let bias = |name: &str, len: usize, start: usize, col_step: usize| {
        let strides = Strides { start, run: 1, run_step: 0, row_step: 0, col_step };
        vec![View::new(format!("{module}.{name}"), &[experts, len], strides)]
    };
    let apart =
        |part: &str| View::of_stack(format!("{module}.{part}_proj.weight"), [experts, rows, cols], index, 0, rows);
    let bias_apart = |part: &str| bias(&format!("{part}_proj.bias"), cols, index * cols, 1);
    match tensor.name {
        "gate_up" => {
            let ([gate_blocks, gate], [up_blocks, up]) = (pair(0), pair(1));
            vec![vec![gate_blocks, up_blocks], vec![gate, up], vec![apart("gate"), apart("up")]]
        }
        "down" => {
            let name = format!("{module}.down_proj");
            let start = index * rows * cols;
            let by_col = Strides { start, run: rows, run_step: 0, row_step: 1, col_step: rows };
            vec![
                vec![View::of_stack(format!("{name}_blocks"), [experts, rows, cols], index, 0, rows)],
                vec![View::new(name, &[experts, cols, rows], by_col)],
                vec![apart("down")],
            ]
        }
        "gate_bias" => vec![bias("gate_up_proj_bias", 2 * cols, index * 2 * cols, 2), bias_apart("gate")],
        "up_bias" => vec![bias("gate_up_proj_bias", 2 * cols, index * 2 * cols + 1, 2), bias_apart("up")],
        "down_bias" => vec![bias("down_proj_bias", cols, index * cols, 1), bias_apart("down")],
        other => unreachable!("an expert has no `{other}`"),
    }
}
