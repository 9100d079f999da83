//! Which experts a token uses, and with what weight.

use sluice_format::{GroupScore, MoeSpec, RouterScore};
use sluice_kernels::{exp, sigmoid, softmax, top_k};

use super::delta::softplus;
use super::thrift::Preferred;
pub use sluice_storage::pool::Choice;

/// Buffers that routing reuses from token to token.
#[derive(Debug, Default)]
pub struct RouterScratch {
    scores: Vec<f32>,
    choice: Vec<f32>,
    group_scores: Vec<f32>,
    kept_groups: Vec<u32>,
    chosen: Vec<u32>,
    /// The router's own choice, if experts in memory are preferred.
    own: Vec<u32>,
}

/// Routes one token: appends its `top_k` choices to `out`, in ascending order of expert, which is the order of summation.
///
/// `logits`: the router's output, one per expert. `bias`: one per expert, added to the scores for the choice only. Formulas:
/// DeepSeek-V3, arXiv:2412.19437, equations 12–16; softmax scores as in DeepSeek-V2.
pub fn route(moe: &MoeSpec, logits: &[f32], bias: Option<&[f32]>, scratch: &mut RouterScratch, out: &mut Vec<Choice>) {
    score(moe, logits, bias, scratch);
    top_k(&scratch.choice, moe.top_k, &mut scratch.chosen);
    weigh(moe, scratch, out);
}

/// Like [`route`], but prefers experts in memory to others with slightly better scores. Returns how many of the choices differ from
/// the router's own. Raising the scores of what is in memory is the cache prior of arXiv:2412.00099.
pub fn route_preferring(
    moe: &MoeSpec,
    logits: &[f32],
    bias: Option<&[f32]>,
    preferred: &Preferred<'_>,
    scratch: &mut RouterScratch,
    out: &mut Vec<Choice>,
) -> usize {
    score(moe, logits, bias, scratch);
    top_k(&scratch.choice, moe.top_k, &mut scratch.own);
    prefer(moe, preferred, scratch);
    top_k(&scratch.choice, moe.top_k, &mut scratch.chosen);
    let others = scratch.chosen.iter().filter(|expert| !scratch.own.contains(expert)).count();
    weigh(moe, scratch, out);
    others
}

/// Raises the numbers that decide the choice, for experts in memory. Weights come from the scores, which do not change.
fn prefer(moe: &MoeSpec, preferred: &Preferred<'_>, scratch: &mut RouterScratch) {
    let RouterScratch { choice, kept_groups, .. } = scratch;
    // Experts of other groups stay excluded from the choice, whatever number marks them.
    let size = moe.router.groups.as_ref().map_or(moe.experts, |groups| moe.experts / groups.count);
    let has_groups = moe.router.groups.is_some();
    let takes_part = |expert: usize| !has_groups || kept_groups.contains(&((expert / size) as u32));
    let scores = choice.iter().enumerate().filter(|&(expert, _)| takes_part(expert)).map(|(_, &score)| score);
    let (least, most) =
        scores.fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), score| (least.min(score), most.max(score)));
    let raise = preferred.part * (most - least);
    for (expert, score) in choice.iter_mut().enumerate() {
        if takes_part(expert) && (preferred.in_memory)(expert as u32) {
            *score += raise;
        }
    }
}

/// Like [`route`], for a token that has these `experts`, whatever their scores.
pub fn route_to(moe: &MoeSpec, logits: &[f32], experts: &[u32], scratch: &mut RouterScratch, out: &mut Vec<Choice>) {
    score(moe, logits, None, scratch);
    scratch.chosen.clear();
    scratch.chosen.extend_from_slice(experts);
    weigh(moe, scratch, out);
}

/// Appends the chosen experts with their weights.
fn weigh(moe: &MoeSpec, scratch: &mut RouterScratch, out: &mut Vec<Choice>) {
    let RouterScratch { scores, choice, chosen, .. } = scratch;
    if moe.router.score == RouterScore::SoftmaxOfChosen {
        // Only the chosen logits take part, in descending order.
        choice.clear();
        choice.extend(chosen.iter().map(|&e| scores[e as usize]));
        softmax(choice);
        chosen.iter().zip(&*choice).for_each(|(&e, &w)| scores[e as usize] = w);
    }
    if moe.router.score == RouterScore::SigmoidOfChosen {
        chosen.iter().for_each(|&e| scores[e as usize] = sigmoid(scores[e as usize]));
    }
    if let RouterScore::SparseMixer { jitter } = moe.router.score {
        choice.clear();
        choice.extend((0..chosen.len()).map(|i| share_of_near(scores, &chosen[..=i], jitter)));
        chosen.iter().zip(&*choice).for_each(|(&e, &w)| scores[e as usize] = w);
    }
    // The reference sums the weights in the order of descending score.
    let sum: f32 = chosen.iter().map(|&e| scores[e as usize]).sum();
    let divisor = moe.router.renormalise.map_or(1.0, |eps| (sum + eps).max(moe.router.least_sum.unwrap_or(0.0)));
    chosen.sort_unstable();
    let weight = |expert: u32| scores[expert as usize] / divisor * moe.router.scale;
    out.extend(chosen.iter().map(|&expert| Choice { expert, weight: weight(expert) }));
}

/// The share of the last of `chosen` in the softmax over the experts that are not chosen before it and whose logit is near its own
/// ([`RouterScore::SparseMixer`]).
fn share_of_near(logits: &[f32], chosen: &[u32], jitter: f32) -> f32 {
    let Some((&last, before)) = chosen.split_last() else { return 0.0 };
    let most = logits[last as usize];
    let is_far = |logit: f32| (most - logit) / logit.abs().max(most) > 2.0 * jitter;
    let others = (0u32..).zip(logits).filter(|(expert, logit)| !before.contains(expert) && !is_far(**logit));
    1.0 / others.map(|(_, logit)| exp(logit - most)).sum::<f32>()
}

/// The `count` experts that the router prefers, best first; the first `top_k` are what it would choose.
pub fn rank(
    moe: &MoeSpec,
    logits: &[f32],
    bias: Option<&[f32]>,
    count: usize,
    scratch: &mut RouterScratch,
    out: &mut Vec<u32>,
) {
    score(moe, logits, bias, scratch);
    top_k(&scratch.choice, count.min(moe.experts), out);
}

/// Leaves the experts' scores, and the numbers that decide the choice, in the scratch.
fn score(moe: &MoeSpec, logits: &[f32], bias: Option<&[f32]>, scratch: &mut RouterScratch) {
    let RouterScratch { scores, choice, .. } = scratch;
    scores.clear();
    match moe.router.score {
        RouterScore::Sigmoid => scores.extend(logits.iter().map(|&l| sigmoid(l))),
        RouterScore::Softmax => {
            scores.extend_from_slice(logits);
            softmax(scores);
        }
        RouterScore::SqrtSoftplus => scores.extend(logits.iter().map(|&l| softplus(l).sqrt())),
        RouterScore::SoftmaxOfChosen | RouterScore::SigmoidOfChosen | RouterScore::SparseMixer { .. } => {
            scores.extend_from_slice(logits);
        }
    }
    choice.clear();
    match bias {
        Some(bias) => choice.extend(scores.iter().zip(bias).map(|(s, b)| s + b)),
        None => choice.extend_from_slice(scores),
    }
    limit_to_groups(moe, scratch);
}

/// Excludes the experts of all but the best groups from the choice.
fn limit_to_groups(moe: &MoeSpec, scratch: &mut RouterScratch) {
    let Some(groups) = &moe.router.groups else { return };
    let RouterScratch { choice, group_scores, kept_groups, .. } = scratch;
    let size = moe.experts / groups.count;
    group_scores.clear();
    group_scores.extend(choice.chunks_exact(size).map(|group| match groups.score {
        GroupScore::TopTwoSum => {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &s in group {
                if s > first {
                    (first, second) = (s, first);
                } else if s > second {
                    second = s;
                }
            }
            if size == 1 { first } else { first + second }
        }
        GroupScore::Max => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
    }));
    top_k(group_scores, groups.keep, kept_groups);
    let masked = match groups.score {
        GroupScore::TopTwoSum => f32::NEG_INFINITY,
        GroupScore::Max => 0.0,
    };
    for (g, group) in choice.chunks_exact_mut(size).enumerate() {
        if !kept_groups.contains(&(g as u32)) {
            group.fill(masked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_format::{RouterGroups, RouterSpec};

    fn moe(groups: Option<RouterGroups>, renormalise: Option<f32>) -> MoeSpec {
        MoeSpec {
            experts: 8,
            top_k: 2,
            width: 8,
            latent: None,
            expert_bias: false,
            weighted_input: false,
            apart: false,
            router: RouterSpec {
                score: RouterScore::Sigmoid,
                logit_factor: None,
                logit_bias: false,
                choice_bias: true,
                groups,
                renormalise,
                least_sum: None,
                scale: 2.0,
                expert_scale: false,
                token_table: None,
            },
        }
    }

    fn routed(moe: &MoeSpec, logits: &[f32], bias: &[f32]) -> Vec<Choice> {
        let mut out = Vec::new();
        route(moe, logits, Some(bias), &mut RouterScratch::default(), &mut out);
        out
    }

    #[test]
    fn a_sparse_mixer_weighs_among_logits_that_are_near() {
        let mut spec = moe(None, None);
        (spec.router.score, spec.router.scale) = (RouterScore::SparseMixer { jitter: 0.05 }, 1.0);
        let routed = |logits: [f32; 8]| {
            let mut out = Vec::new();
            route(&spec, &logits, None, &mut RouterScratch::default(), &mut out);
            [0, 1].map(|i| (out[i].expert, out[i].weight))
        };
        // An expert without a near competitor has all of its softmax.
        assert_eq!(routed([-9.0, 4.0, 0.0, 1.0, -1.0, 3.0, 0.0, 0.0]), [(1, 1.0), (5, 1.0)]);
        // 4.0 and 3.8 are near each other; without the first, 3.8 and 3.5 are.
        let [(first, with_second), (second, with_third)] = routed([0.0, 4.0, 3.5, 0.0, 0.0, 3.8, 0.0, 0.0]);
        assert_eq!((first, second), (1, 5));
        assert!((with_second - 1.0 / (1.0 + (-0.2f32).exp())).abs() < 1e-6, "{with_second}");
        assert!((with_third - 1.0 / (1.0 + (-0.3f32).exp())).abs() < 1e-6, "{with_third}");
    }

    #[test]
    fn bias_decides_the_choice_but_not_the_weight() {
        let logits = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0];
        let mut bias = [0.0; 8];
        bias[1] = 5.0;
        let choices = routed(&moe(None, None), &logits, &bias);
        assert_eq!(choices.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 6]);
        assert_eq!(choices[0].weight, 2.0 * sigmoid(0.0));
        assert_eq!(choices[1].weight, 2.0 * sigmoid(3.0));
    }

    #[test]
    fn a_table_decides_the_choice_and_scores_the_weights() {
        let logits = [0.0, 2.0, 1.0, -1.0, 0.5, 3.0, 0.0, 0.0];
        let mut moe = moe(None, Some(0.0));
        moe.router.score = RouterScore::SqrtSoftplus;
        let mut out = Vec::new();
        route_to(&moe, &logits, &[4, 1], &mut RouterScratch::default(), &mut out);
        let score = |logit: f64| logit.exp().ln_1p().sqrt();
        let (first, second) = (score(2.0), score(0.5));
        assert_eq!(out.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 4]);
        for (choice, want) in out.iter().zip([first, second]) {
            let want = 2.0 * want / (first + second);
            assert!((f64::from(choice.weight) - want).abs() < 1e-6, "{} instead of {want}", choice.weight);
        }
    }

    #[test]
    fn groups_are_ranked_by_their_two_best_experts() {
        let groups = RouterGroups { count: 4, keep: 1, score: GroupScore::TopTwoSum };
        // Expert 0 is the best of all, but group 1 (experts 2 and 3) has the best pair.
        let logits = [4.0, -9.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0];
        let choices = routed(&moe(Some(groups), Some(1e-20)), &logits, &[0.0; 8]);
        assert_eq!(choices.iter().map(|c| c.expert).collect::<Vec<_>>(), [2, 3]);
        let total: f32 = choices.iter().map(|c| c.weight).sum();
        assert!((total - 2.0).abs() < 1e-6);
    }

    #[test]
    fn experts_in_memory_are_preferred_to_little_better_ones() {
        let mut spec = moe(None, Some(1e-20));
        (spec.router.score, spec.router.scale) = (RouterScore::SoftmaxOfChosen, 1.0);
        // The distance from the best to the lowest logit is 10.
        let logits = [0.0, 10.0, 8.0, 7.5, 7.0, 1.0, 2.0, 3.0];
        let choose = |part: f32, memory: &[u32]| {
            let (in_memory, mut out) = (|expert: u32| memory.contains(&expert), Vec::new());
            let preferred = Preferred { part, in_memory: &in_memory };
            let others = route_preferring(&spec, &logits, None, &preferred, &mut RouterScratch::default(), &mut out);
            (out.iter().map(|c| c.expert).collect::<Vec<_>>(), others, out[0].weight)
        };
        assert_eq!(choose(0.04, &[3, 4]).0, [1, 2], "8 is better by more than 0.4");
        assert_eq!(choose(0.06, &[3, 4]).0, [1, 3], "and by less than 0.6");
        assert_eq!(choose(0.06, &[2, 3, 4]), choose(0.0, &[]), "what the router wants is there");
        assert_eq!(choose(0.4, &[3, 4]).0, [3, 4]);
        assert_eq!([0.0, 0.06, 0.4].map(|part| choose(part, &[3, 4]).1), [0, 1, 2]);
        let share = 1.0 / (1.0 + (-2.5f32).exp());
        assert!((choose(0.06, &[3]).2 - share).abs() < 1e-6, "weights are those of the scores");
    }

    #[test]
    fn experts_of_other_groups_are_not_preferred() {
        let groups = RouterGroups { count: 4, keep: 1, score: GroupScore::Max };
        let mut spec = moe(Some(groups), None);
        spec.router.score = RouterScore::Softmax;
        let (in_memory, mut out) = (|expert: u32| expert > 1, Vec::new());
        let preferred = Preferred { part: 1.0, in_memory: &in_memory };
        let logits = [5.0, -9.0, 4.0, 4.0, 0.0, 0.0, 0.0, 0.0];
        route_preferring(&spec, &logits, None, &preferred, &mut RouterScratch::default(), &mut out);
        assert_eq!(out.iter().map(|c| c.expert).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn sigmoids_of_chosen_logits_do_not_decide_the_choice() {
        let mut moe = moe(None, None);
        (moe.router.score, moe.router.choice_bias) = (RouterScore::SigmoidOfChosen, false);
        // As sigmoids, the two largest of these are equal in f32.
        let mut out = Vec::new();
        let logits = [0.0, 30.0, 20.0, 25.0, 0.0, 0.0, 0.0, 0.0];
        route(&moe, &logits, None, &mut RouterScratch::default(), &mut out);
        assert_eq!(out.iter().map(|c| (c.expert, c.weight)).collect::<Vec<_>>(), [(1, 2.0), (3, 2.0)]);
    }

    #[test]
    fn weights_are_divided_by_the_least_sum_or_more() {
        let weights = |least: Option<f32>, logit: f32| {
            let mut moe = moe(None, Some(0.0));
            moe.router.least_sum = least;
            routed(&moe, &[logit; 8], &[0.0; 8]).iter().map(|c| c.weight).sum::<f32>()
        };
        assert_eq!(weights(None, -20.0), 2.0);
        assert_eq!(weights(Some(1e-3), -20.0), 2.0 * (2.0 * sigmoid(-20.0)) / 1e-3);
        assert_eq!(weights(Some(1e-3), 0.0), 2.0);
    }
}
