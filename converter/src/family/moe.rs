//! Routed experts: keys of `config.json`.

use sluice_format::limits::{MAX_EXPERTS, MAX_WIDTH};
use sluice_format::{FfnSpec, GroupScore, MoeSpec, RouterGroups, RouterScore, RouterSpec};

use super::decoder::Decoder;
use crate::error::ConvertError;

/// DeepSeek-V3's reference adds this to the sum of the chosen weights.
pub(crate) const RENORMALISE_EPS: f32 = 1e-20;

/// Values for missing keys.
pub(crate) struct Defaults {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Width of one expert.
    pub(crate) width: usize,
    /// Width of the shared expert, in experts.
    pub(crate) shared: usize,
    pub(crate) groups: usize,
    pub(crate) groups_kept: usize,
    pub(crate) scale: f64,
}

/// Number of experts, under the keys that families use, and how many of them a token has.
fn experts(decoder: &Decoder<'_>, defaults: &Defaults) -> Result<(usize, usize), ConvertError> {
    let config = decoder.config;
    let key = config.first_of(&["n_routed_experts", "num_experts", "num_local_experts"]);
    let experts = config.opt_size_or(key, Some(defaults.experts), MAX_EXPERTS)?.unwrap_or(defaults.experts);
    let per_token = config.first_of(&["num_experts_per_tok", "num_experts_per_token"]);
    Ok((experts, config.size_or(per_token, defaults.top_k, experts)?))
}

/// Softmax over all experts; the chosen weights are divided by their sum if `renormalise`.
pub(crate) fn softmax_router(renormalise: bool) -> RouterSpec {
    RouterSpec {
        score: RouterScore::Softmax,
        logit_factor: None,
        logit_bias: false,
        choice_bias: false,
        groups: None,
        renormalise: renormalise.then_some(0.0),
        least_sum: None,
        scale: 1.0,
        expert_scale: false,
        token_table: None,
    }
}

/// Experts with a softmax router; no shared expert.
pub(crate) fn softmax_experts(
    decoder: &Decoder<'_>,
    defaults: &Defaults,
    width_key: &str,
    renormalise: bool,
) -> Result<FfnSpec, ConvertError> {
    let (experts, top_k) = experts(decoder, defaults)?;
    let width = decoder.config.size_or(width_key, defaults.width, MAX_WIDTH)?;
    let moe = plain([experts, top_k, width], softmax_router(renormalise));
    Ok(FfnSpec { moe: Some(moe), ..FfnSpec::NONE })
}

/// This many experts, how many of them are chosen, and their width, without optional parts.
pub(crate) fn plain([experts, top_k, width]: [usize; 3], router: RouterSpec) -> MoeSpec {
    MoeSpec { experts, top_k, width, latent: None, expert_bias: false, weighted_input: false, apart: false, router }
}

/// Experts as in DeepSeek-V3: sigmoid scores, a bias on the choice, groups, a shared expert.
pub(crate) fn deepseek_v3(decoder: &Decoder<'_>, defaults: &Defaults) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    config.require_str(config.first_of(&["scoring_func", "moe_router_activation_func"]), &["sigmoid"])?;
    config.require_str("topk_method", &["noaux_tc"])?;
    let norm = config.first_of(&["norm_topk_prob", "moe_renormalize"]);
    let renormalise = config.bool_or(norm, true)?.then_some(RENORMALISE_EPS);
    let router = RouterSpec {
        score: RouterScore::Sigmoid,
        choice_bias: true,
        groups: groups(decoder, defaults, GroupScore::TopTwoSum)?,
        renormalise,
        // MiMo's release has null here.
        scale: match config.has("routed_scaling_factor") {
            true => config.f32_or("routed_scaling_factor", defaults.scale)?,
            false => defaults.scale as f32,
        },
        ..softmax_router(false)
    };
    with_shared(decoder, defaults, router)
}

/// The limit on groups, if there is more than one; a single group limits nothing.
pub(crate) fn groups(
    decoder: &Decoder<'_>,
    defaults: &Defaults,
    score: GroupScore,
) -> Result<Option<RouterGroups>, ConvertError> {
    let config = decoder.config;
    let (experts, top_k) = experts(decoder, defaults)?;
    let key = config.first_of(&["n_group", "num_expert_group"]);
    let count = config.opt_size_or(key, Some(defaults.groups), experts)?.unwrap_or(1);
    let keep = config.opt_size_or("topk_group", Some(defaults.groups_kept.min(count)), count)?.unwrap_or(count);
    if !experts.is_multiple_of(count) {
        return Err(config.refuse(key, format!("is {count}, which does not divide the {experts} experts")));
    }
    if count == 1 {
        return Ok(None);
    }
    if score == GroupScore::TopTwoSum {
        let members = experts / count;
        if members == 1 {
            let problem = format!("is {count}: a group of one expert has no two best scores");
            return Err(config.refuse(key, problem));
        }
        if keep * members < top_k {
            let problem = format!("is {keep}: that many groups hold fewer than the {top_k} of `num_experts_per_tok`");
            return Err(config.refuse("topk_group", problem));
        }
    }
    Ok(Some(RouterGroups { count, keep, score }))
}

/// Experts with DeepSeek's keys, and the shared expert, which has the width of `n_shared_experts` experts.
pub(crate) fn with_shared(
    decoder: &Decoder<'_>,
    defaults: &Defaults,
    router: RouterSpec,
) -> Result<FfnSpec, ConvertError> {
    let config = decoder.config;
    let (experts, top_k) = experts(decoder, defaults)?;
    let width = config.size_or("moe_intermediate_size", defaults.width, MAX_WIDTH)?;
    let key = config.first_of(&["n_shared_experts", "num_shared_experts"]);
    let shared = config.opt_usize_or(key, Some(defaults.shared))?.unwrap_or(0);
    of_shape(decoder, &Shape { experts, top_k, width, shared }, key, router)
}

/// Numbers and widths of experts.
pub(crate) struct Shape {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Width of one expert.
    pub(crate) width: usize,
    /// Width of the shared expert, in experts.
    pub(crate) shared: usize,
}

/// Experts of this shape; `shared_key` gives the width of the shared expert.
pub(crate) fn of_shape(
    decoder: &Decoder<'_>,
    shape: &Shape,
    shared_key: &str,
    router: RouterSpec,
) -> Result<FfnSpec, ConvertError> {
    let Shape { experts, top_k, width, shared } = *shape;
    let dense_width = width.saturating_mul(shared);
    if dense_width > MAX_WIDTH {
        let problem = format!("is {shared}: together wider than {MAX_WIDTH}");
        return Err(decoder.config.refuse(shared_key, problem));
    }
    let moe = plain([experts, top_k, width], router);
    Ok(FfnSpec { dense_width, moe: Some(moe), ..FfnSpec::NONE })
}

/// Which layers have experts: all from `first_k_dense_replace` on, or as a list says.
pub(crate) fn after_dense(decoder: &Decoder<'_>, default_dense: usize) -> Result<Vec<bool>, ConvertError> {
    let config = decoder.config;
    if config.usize_or("moe_layer_freq", 1)? != 1 {
        return Err(config.refuse("moe_layer_freq", "must be 1"));
    }
    if let Some(list) = decoder.layer_list("mlp_layer_types", ["sparse", "dense"])? {
        return Ok(list);
    }
    let dense = config.usize_or("first_k_dense_replace", default_dense)?;
    Ok((0..decoder.layers).map(|layer| layer >= dense).collect())
}

/// Which layers have experts in Qwen's spelling: every `decoder_sparse_step`-th, except `mlp_only_layers`.
pub(crate) fn by_step(decoder: &Decoder<'_>) -> Result<Vec<bool>, ConvertError> {
    let config = decoder.config;
    if let Some(list) = decoder.layer_list("mlp_layer_types", ["sparse", "dense"])? {
        return Ok(list);
    }
    let step = config.usize_or("decoder_sparse_step", 1)?;
    if step == 0 {
        return Err(config.refuse("decoder_sparse_step", "is 0, expected 1 or more"));
    }
    let dense = config.opt_list("mlp_only_layers")?.unwrap_or_default();
    let is_dense = |layer: usize| dense.iter().any(|d| d.as_u64() == Some(layer as u64));
    Ok((0..decoder.layers).map(|layer| (layer + 1) % step == 0 && !is_dense(layer)).collect())
}
