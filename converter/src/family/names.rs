//! The names of tensors. In checkpoints on the hub, experts are separate; transformers since version 5 fuses them, and MLX stacks
//! them. All three forms are accepted for every family.

use sluice_format::{AttentionSpec, ExtentKind, LayerSpec, ModelSpec, TensorShape};

use super::view::{Origin, View};
use super::{Place, delta, gqa, mla};

/// Names of a decoder, such as `model.layers.3.mlp.down_proj.weight`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    /// The text before `layers.N`, such as `model.`.
    pub(crate) prefix: &'static str,
    /// The token embedding, after the prefix.
    pub(crate) embedding: &'static str,
    /// The output head.
    pub(crate) head: &'static str,
    /// The module of a feed-forward network without experts.
    pub(crate) dense: &'static str,
    /// Modules of a layer that may hold router and experts, the usual one first.
    pub(crate) moe: &'static [&'static str],
    /// The router's module inside that module.
    pub(crate) router: &'static str,
    /// Gate, up and down of one expert.
    pub(crate) expert: [&'static str; 3],
    /// The shared expert's module.
    pub(crate) shared: &'static str,
    /// Whether norms are stored around zero, so that the model multiplies by one more.
    pub(crate) zero_centred: bool,
    /// Whether MLX adds that one before saving such norms.
    pub(crate) mlx_adds_one: bool,
    /// Whether convolutions are `[channels, width, 1]` as in MLX, not `[channels, 1, width]`. The order of the numbers is the same.
    pub(crate) conv_last: bool,
    /// The number that layer 0 has in names.
    pub(crate) first: usize,
    /// Modules that may contain a prediction layer, such as `mtp.`, instead of a number after the layers of the decoder.
    pub(crate) mtp: &'static [&'static str],
    /// Parts into which a fused projection of queries, keys and values is divided: each has its share of all three.
    pub(crate) qkv_shards: usize,
}

impl Names {
    /// The names of most checkpoints.
    pub(crate) const USUAL: Names = Names {
        prefix: "model.",
        embedding: "embed_tokens.weight",
        head: "lm_head.weight",
        dense: "mlp",
        moe: &["mlp"],
        router: "gate",
        expert: ["gate_proj", "up_proj", "down_proj"],
        shared: "shared_experts",
        zero_centred: false,
        mlx_adds_one: true,
        conv_last: false,
        first: 0,
        mtp: &[],
        qkv_shards: 1,
    };

    /// The names of Mixtral and its descendants.
    pub(crate) const MIXTRAL: Names =
        Names { moe: &["block_sparse_moe", "mlp"], expert: ["w1", "w3", "w2"], ..Names::USUAL };

    /// The token embedding.
    pub(crate) fn embedding(self) -> String {
        format!("{}{}", self.prefix, self.embedding)
    }

    /// The norm before the head.
    pub(crate) fn final_norm(self, hidden: usize) -> View {
        self.norm(format!("{}norm.weight", self.prefix), hidden)
    }

    /// Where a tensor after the last layer comes from, except the head.
    pub(crate) fn final_origin(self, tensor: &TensorShape) -> Origin {
        let len = tensor.shape[2];
        let view = match tensor.name {
            "norm" => self.final_norm(len),
            "norm_bias" => View::vector(format!("{}norm.bias", self.prefix), len),
            "head_bias" => View::vector(self.head.replace(".weight", ".bias"), len),
            other => unreachable!("there is no `{other}` behind the last layer"),
        };
        vec![vec![view]]
    }

    /// A tensor of a layer.
    pub(crate) fn layer(self, layer: usize, rest: &str) -> String {
        format!("{}layers.{}.{rest}", self.prefix, self.first + layer)
    }

    /// The layer to which a tensor belongs.
    pub(crate) fn layer_of(self, name: &str) -> Option<usize> {
        let (number, _) = name.strip_prefix(self.prefix)?.strip_prefix("layers.")?.split_once('.')?;
        number.parse().ok()
    }

    /// The layer, if this tensor marks it as one that predicts further tokens: the projection of a token's embedding together with
    /// a hidden state, which no layer of a decoder has.
    pub(crate) fn prediction_layer_of(self, name: &str) -> Option<usize> {
        let layer = self.layer_of(name)?;
        name.starts_with(&self.layer(layer, "eh_proj.")).then_some(layer)
    }

    /// Vectors that are stored around zero if norms are.
    pub(crate) fn centred_norms(self, spec: &ModelSpec) -> Vec<String> {
        let gated = spec.gated_streams.is_some();
        let norms = &spec.norms;
        let of_layer = |(layer, spec): (usize, &LayerSpec)| {
            let (mut heads, mut choice): (&[&str], &[&str]) = (&[], &[]);
            if let AttentionSpec::Gqa(gqa) = &spec.attention {
                if gqa.qk_norm.is_some() {
                    heads = &["self_attn.q_norm.weight", "self_attn.k_norm.weight"];
                }
                if gqa.blocks.is_some() {
                    choice = &["self_attn.index_q_norm.weight", "self_attn.index_k_norm.weight"];
                }
            }
            let both = if gated {
                ["attn_hyper_connection.hc_norm.weight", "mlp_hyper_connection.hc_norm.weight"]
            } else {
                ["input_layernorm.weight", "post_attention_layernorm.weight"]
            };
            let behind = ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"];
            let behind = if norms.behind { &behind[..] } else { &[] };
            both.iter().chain(behind).chain(heads).chain(choice).map(|rest| self.layer(layer, rest)).collect::<Vec<_>>()
        };
        let layers = spec.layers.iter().enumerate().flat_map(of_layer);
        layers.chain([self.final_norm(spec.hidden_size).tensor]).collect()
    }

    /// A norm with any name.
    pub(super) fn norm(self, tensor: String, len: usize) -> View {
        View { plus_one: self.zero_centred, ..View::vector(tensor, len) }
    }

    /// A vector of a layer with a name of its own.
    pub(crate) fn vector(self, place: Place, rest: &str, tensor: &TensorShape) -> Origin {
        vec![vec![View::vector(self.layer(place.layer, rest), tensor.shape[2])]]
    }

    /// `own`, and after it the origin of a tensor under the usual names: transformers since version 5 and MLX use them for most
    /// tensors, and so do the names made from GGUF.
    pub(crate) fn or_usual(self, own: Origin, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        let usual = Names { prefix: self.prefix, head: self.head, first: self.first, ..Names::USUAL };
        [own, usual.origin(spec, place, tensor)].concat()
    }

    /// Where a tensor comes from, for families that differ only in names.
    pub(crate) fn origin(self, spec: &ModelSpec, place: Place, tensor: &TensorShape) -> Origin {
        self.origin_in(spec, place, &|rest| self.layer(place.layer, rest), tensor)
    }

    /// The same for families that complete the names of a layer differently.
    pub(crate) fn origin_in(
        self,
        spec: &ModelSpec,
        place: Place,
        name: &dyn Fn(&str) -> String,
        tensor: &TensorShape,
    ) -> Origin {
        let layer = &spec.layers[place.layer];
        match place.kind {
            ExtentKind::Attention => self.attention(layer, name, tensor),
            ExtentKind::Router => self.router(spec, name, tensor).into_iter().map(|view| vec![view]).collect(),
            ExtentKind::Dense => self.dense(layer, name, tensor),
            ExtentKind::Expert => self.expert(layer, name, place.index, tensor),
            kind => unreachable!("{kind} is in no layer"),
        }
    }

    fn attention(self, spec: &LayerSpec, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> Origin {
        let (name, shape) = (tensor.name, tensor.shape);
        let one = |view: View| vec![vec![view]];
        match (name, &spec.attention) {
            ("attn_norm", _) => one(self.norm(layer("input_layernorm.weight"), shape[2])),
            ("attn_norm_bias", _) => one(View::vector(layer("input_layernorm.bias"), shape[2])),
            ("attn_post_norm", _) => one(self.norm(layer("post_attention_layernorm.weight"), shape[2])),
            (_, AttentionSpec::Mla(spec)) => mla::origin(spec, layer, name, shape),
            (_, AttentionSpec::Gqa(spec)) => {
                let plus_one = self.zero_centred && name.ends_with("_norm");
                one(View { plus_one, ..gqa::origin(spec, layer, name, shape) })
            }
            // The norm inside is not zero-centred, even if the others are.
            (_, AttentionSpec::Delta(spec)) => delta::origin(spec, self.conv_last, layer, name, shape),
            (_, AttentionSpec::Mamba(_) | AttentionSpec::Compressed(_)) => {
                unreachable!("a family with such attention has names of its own")
            }
        }
    }

    fn router(self, spec: &ModelSpec, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> Vec<View> {
        let [_, rows, cols] = tensor.shape;
        let vector = |rest: String| View::vector(layer(&rest), cols);
        let gate = self.router;
        let each = |view: &dyn Fn(&str) -> View| self.moe.iter().map(|m| view(m)).collect::<Vec<_>>();
        match tensor.name {
            // A norm after attention has this name.
            "ffn_norm" if spec.norms.behind => vec![self.norm(layer("pre_feedforward_layernorm.weight"), cols)],
            "ffn_norm" => vec![self.norm(layer("post_attention_layernorm.weight"), cols)],
            "ffn_norm_bias" => vec![vector("post_attention_layernorm.bias".to_owned())],
            "ffn_post_norm" => vec![self.norm(layer("post_feedforward_layernorm.weight"), cols)],
            "router" => each(&|m| View::whole(layer(&format!("{m}.{gate}.weight")), rows, cols)),
            "router_logit_bias" => each(&|m| vector(format!("{m}.{gate}.bias"))),
            // In DeepSeek's models it is in the router, in MiniMax's beside it.
            "router_bias" => {
                let mut views = each(&|m| vector(format!("{m}.{gate}.e_score_correction_bias")));
                views.extend(each(&|m| vector(format!("{m}.e_score_correction_bias"))));
                views
            }
            other => unreachable!("a router has no `{other}`"),
        }
    }

    fn dense(self, spec: &LayerSpec, layer: &dyn Fn(&str) -> String, tensor: &TensorShape) -> Origin {
        let [_, rows, cols] = tensor.shape;
        if spec.ffn.moe.is_none() {
            return vec![gated(&layer(self.dense), Names::USUAL.expert, tensor)];
        }
        let each = |m: &&str| match tensor.name {
            "dense_gate" => vec![View::whole(layer(&format!("{m}.{}_gate.weight", self.shared)), rows, cols)],
            _ => gated(&layer(&format!("{m}.{}", self.shared)), Names::USUAL.expert, tensor),
        };
        self.moe.iter().map(each).collect()
    }

    fn expert(self, spec: &LayerSpec, layer: &dyn Fn(&str) -> String, index: usize, tensor: &TensorShape) -> Origin {
        let count = spec.ffn.moe.as_ref().map_or(0, |m| m.experts);
        let single = |m: &&str| gated(&layer(&format!("{m}.experts.{index}")), self.expert, tensor);
        let fused = |m: &&str| fused(&layer(&format!("{m}.experts")), count, index, tensor);
        let stacked = |m: &&str| stacked(&layer(&format!("{m}.switch_mlp")), count, index, tensor);
        let modules = self.moe.iter();
        modules.clone().map(single).chain(modules.clone().map(fused)).chain(modules.map(stacked)).collect()
    }
}

/// A whole matrix.
pub(crate) fn matrix(name: String, tensor: &TensorShape) -> Origin {
    let [_, rows, cols] = tensor.shape;
    vec![vec![View::whole(name, rows, cols)]]
}

/// A separate feed-forward network; `parts` are its gate, up and down.
pub(crate) fn gated(module: &str, parts: [&str; 3], tensor: &TensorShape) -> Vec<View> {
    let [_, rows, cols] = tensor.shape;
    let part = |which: &str| View::whole(format!("{module}.{which}.weight"), rows, cols);
    match tensor.name {
        "gate_up" => vec![part(parts[0]), part(parts[1])],
        "up" => vec![part(parts[1])],
        "down" => vec![part(parts[2])],
        other => unreachable!("a feed-forward network has no `{other}`"),
    }
}

/// One of all experts of a layer as in transformers: gate before up in one tensor, down in another.
pub(crate) fn fused(module: &str, experts: usize, index: usize, tensor: &TensorShape) -> Vec<View> {
    let [_, rows, cols] = tensor.shape;
    match tensor.name {
        "gate_up" => {
            let half =
                |first| View::of_stack(format!("{module}.gate_up_proj"), [experts, 2 * rows, cols], index, first, rows);
            vec![half(0), half(rows)]
        }
        which => vec![View::of_stack(format!("{module}.{which}_proj"), [experts, rows, cols], index, 0, rows)],
    }
}

/// One of all experts of a layer as in MLX: three stacked tensors.
pub(crate) fn stacked(module: &str, experts: usize, index: usize, tensor: &TensorShape) -> Vec<View> {
    let [_, rows, cols] = tensor.shape;
    let part =
        |which: &str| View::of_stack(format!("{module}.{which}_proj.weight"), [experts, rows, cols], index, 0, rows);
    match tensor.name {
        "gate_up" => vec![part("gate"), part("up")],
        which => vec![part(which)],
    }
}
