//! Known names, for messages about an unknown one.

/// Least nearness of a name to one that was meant. Names that have nothing to do with each other reach some 0.6.
const NEAR: f64 = 0.8;

/// The nearest of the known names, if one is near. Nearness is that of Jaro and Winkler, which counts what names begin with: families'
/// names begin with those of their authors.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let name = name.to_lowercase();
    let each = known.iter().map(|other| (strsim::jaro_winkler(&name, other), *other));
    each.filter(|(nearness, _)| *nearness >= NEAR).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

/// How a name that is not known is refused: what it is, the nearest of those that are known, if one is near, and all of these.
pub(crate) fn refusal(name: &str, known: &[&str]) -> String {
    let nearest = match nearest(name, known) {
        Some(nearest) => format!("; the nearest that is supported is \"{nearest}\""),
        None => ", which no supported name is near".to_owned(),
    };
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
        let said = refusal("zebra", &known);
        assert!(said.starts_with("is \"zebra\", which no supported name is near (all: deepseek_v2"), "{said}");
    }
}
