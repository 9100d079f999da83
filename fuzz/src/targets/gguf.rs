//! GGUF files: heads that llama.cpp's converter has written, over data that is all zero, are planned, and converted if the model
//! is small.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::checkpoint::convert;
use super::{Seeds, choice, fixture};

/// Bytes of data behind the head: more than any seed describes.
const DATA: u64 = 4 << 20;

pub(crate) fn run(input: &[u8], folder: &Path) {
    let path = folder.join("model.gguf");
    let file = File::create(&path).expect("the folder can be written");
    file.write_all_at(input, 0).expect("the folder can be written");
    file.set_len(input.len() as u64 + DATA).expect("a file may have holes");
    let _ = convert(&path, &folder.join("model.sluice"), choice(input));
    // One that was cut off.
    fs::write(&path, input).expect("the folder can be written");
    let _ = convert(&path, &folder.join("model.sluice"), choice(input));
}

pub(crate) fn seeds(_folder: &Path) -> Seeds {
    macro_rules! heads {
        ($($name:literal),+ $(,)?) => {
            vec![$(($name.to_owned(), fixture!(concat!("gguf/", $name, ".head")).to_vec())),+]
        };
    }
    heads![
        "llama",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe",
        "glm_moe_dsa",
        "gpt_oss_mxfp4",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_moe",
    ]
}
