//! placeholder

pub mod sampler;
pub mod text;
