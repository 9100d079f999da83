//! Known names, for messages about an unknown one.

/// How a name that is not known is refused: what it is, the nearest of those that are known, and all of these. Nearness is that of
/// Jaro and Winkler, which counts what names begin with: families' names begin with those of their authors.
pub(crate) fn refusal(name: &str, known: &[&str]) -> String {
    let nearness = |other: &&&str| strsim::jaro_winkler(&name.to_lowercase(), other);
    let nearest = known.iter().max_by(|a, b| nearness(a).total_cmp(&nearness(b)));
    let nearest = nearest.map_or(String::new(), |nearest| format!("; the nearest that is supported is \"{nearest}\""));
    format!("is \"{name}\"{nearest} (all: {})", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_said_first() {
        let known = ["deepseek_v2", "deepseek_v3", "deepseek_v4", "kimi_k2", "kimi_k25", "qwen3_moe", "llama"];
        for (name, nearest) in
            [("deepseek_v41", "deepseek_v4"), ("kimi_k3", "kimi_k2"), ("Qwen3MoE", "qwen3_moe"), ("llama5", "llama")]
        {
            let said = refusal(name, &known);
            assert!(
                said.starts_with(&format!("is \"{name}\"; the nearest that is supported is \"{nearest}\"")),
                "{said}"
            );
            assert!(said.ends_with("qwen3_moe, llama)"), "{said}");
        }
    }
}
