//! Nemotron-H and Nemotron 3, whose blocks are recognised by their tensors.

use serde_json::Value as Json;

use super::{Problem, Writer};

/// The tensor that identifies a kind of block, and the block's name on the hub.
const BLOCKS: [(&str, &str); 5] = [
    ("ssm_in.weight", "mamba"),
    ("attn_q.weight", "attention"),
    ("attn_qkv.weight", "attention"),
    ("ffn_gate_inp.weight", "moe"),
    ("ffn_up.weight", "mlp"),
];

impl Writer<'_> {
    pub(super) fn nemotron(&mut self) -> Result<(), Problem> {
        let keys = self.keys;
        let block = |layer: usize| {
            let found = BLOCKS.iter().find(|(tensor, _)| keys.of_layer(layer, tensor).is_some());
            let missing = || Problem::new(&format!("blk.{layer}"), "has no tensor that tells what the block is");
            found.map(|(_, name)| Json::from(*name)).ok_or_else(missing)
        };
        let blocks: Vec<Json> = (0..self.layers).map(block).collect::<Result<_, _>>()?;
        self.out.set("layers_block_type", blocks);
        self.copy("rms_norm_eps", "layer_norm_epsilon");
        let (heads, inner) = (keys.need("ssm.time_step_rank")?, keys.need("ssm.inner_size")?);
        if heads == 0 || !inner.is_multiple_of(heads) {
            let problem = format!("is {inner}, no multiple of the {heads} heads of `ssm.time_step_rank`");
            return Err(keys.refuse("ssm.inner_size", problem));
        }
        self.out.set("mamba_num_heads", heads);
        self.out.set("mamba_head_dim", inner / heads);
        self.out.set("n_groups", keys.need("ssm.group_count")?);
        self.out.set("ssm_state_size", keys.need("ssm.state_size")?);
        self.out.set("conv_kernel", keys.need("ssm.conv_kernel")?);
        self.out.set("use_conv_bias", self.has("ssm_conv1d.bias"));
        self.out.set_some("moe_latent_size", keys.uint("moe_latent_size")?.filter(|&width| width > 0));
        Ok(())
    }
}
