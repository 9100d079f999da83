//! Pre-tokenizers by llama.cpp's names (`tokenizer.ggml.pre`).
//!
//! Where they are known, the patterns are those of the published tokenizer.json files, from the files themselves or from comments
//! in llama.cpp's `src/llama-vocab.cpp`, whose own patterns are rewritten for its search. The others are llama.cpp's. Names of
//! tokenizers that no language model has (`jina-v2-de`, `roberta-bpe` and so on) are missing.

use serde_json::{Value, json};

use super::super::metadata::{Metadata, Problem};
use super::vocabulary::shortened;

pub(super) const PRE: &str = "tokenizer.ggml.pre";

/// What is done to a text before its words become tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pre {
    /// Whether texts are first converted to Unicode's composed form.
    nfc: bool,
    steps: &'static [Step],
    /// Whether a word that is a token becomes that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a begin-of-sequence token comes before texts if the file does not say.
    bos: bool,
}

/// A step of splitting.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The matches of the pattern, and the text between them, become words.
    Split(&'static str),
    /// Every digit becomes a word.
    Digits,
    /// Runs of punctuation become words.
    Punctuation,
    /// GPT-2's words, and its characters for bytes.
    Gpt2,
}
use Step::{Digits, Gpt2, Punctuation, Split};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"|\s+(?!\S)|\s+",
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"|\s+(?!\S)|\s+",
);
const QWEN35: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const YOUTU: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const BAILING: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]",
    r"|\s+(?!\S)|\s+",
);
const SEED_CODER: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+",
    r"|\s+(?!\S)|\s+",
);
const EXAONE_MOE: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
);
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DIGITS_FROM_THE_RIGHT: &str = r"\d{1,3}(?=(?:\d{3})*\b)";
const HAN_AND_KANA: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
    "\r\n",
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
    "\r\n",
    r"]*|\s*[",
    "\r\n",
    r"]+|\s+(?!\S)|\s+",
);
/// Letters of scripts with cases, in deepseek-llm's list.
const DEEPSEEK_LETTERS: &str = concat!(
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1f7d}",
    "ᾀ-ᾴᾶ-ᾼ\u{1fbe}ῂ-ῄῆ-ῌῐ-\u{1fd3}ῖ-\u{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ\u{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-",
    "ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
);
const DEEPSEEK_PUNCTUATION: &str = "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+";
const DEEPSEEK_CJK: &str = "[一-龥ࠀ-一가-\u{d7ff}]+";

/// A pre-tokenizer with only these steps.
const fn plain(steps: &'static [Step]) -> Pre {
    Pre { nfc: false, steps, ignore_merges: false, bos: false }
}

/// The same, after converting texts to the composed form.
const fn composed(steps: &'static [Step]) -> Pre {
    Pre { nfc: true, ..plain(steps) }
}

/// For vocabularies from tiktoken.
const fn ranked(steps: &'static [Step]) -> Pre {
    Pre { ignore_merges: true, ..plain(steps) }
}

/// Like [`ranked`], with a begin-of-sequence token unless the file says otherwise.
const fn ranked_with_bos(steps: &'static [Step]) -> Pre {
    Pre { bos: true, ..ranked(steps) }
}

/// The pre-tokenizer with this name; `None` if there is none.
fn named(name: &str) -> Option<Pre> {
    Some(match name {
        // llama.cpp's behaviour for a file that does not say, or whose converter did not know.
        "default" => plain(&[Split(r"[\p{P}\$\+<=>\^~\|]+"), Split(GPT2), Split(r"\p{N}+"), Split("[0-9][0-9][0-9]")]),
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            ranked_with_bos(&[Split(LLAMA3)])
        }
        "dbrx" | "smaug-bpe" => plain(&[Split(LLAMA3)]),
        "glm4" | "glm5" | "chatglm-bpe" => ranked(&[Split(LLAMA3)]),
        "minicpm5" => ranked(&[Split(r"\p{N}{1,3}"), Split(LLAMA3)]),
        "qwen2" | "megrez" | "kormo" | "f2llmv2" => composed(&[Split(QWEN2)]),
        "deepseek-r1-qwen" | "stablelm2" | "solar-open" | "grok-2" => plain(&[Split(QWEN2)]),
        "hunyuan" => Pre { nfc: true, ..ranked(&[Split(QWEN2)]) },
        "qwen35" => composed(&[Split(QWEN35)]),
        "ufakzeka" => plain(&[Split(UFAKZEKA)]),
        "laguna" => plain(&[Split(r"[^\n]+|[\n]+"), Split(QWEN2)]),
        "gpt-4o" | "llama4" | "kanana2" | "talkie" => ranked(&[Split(GPT4O)]),
        "minimax-m2" => plain(&[Split(GPT4O)]),
        "tekken" => ranked_with_bos(&[Split(TEKKEN)]),
        "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => {
            plain(&[Split(r"\p{N}{1,3}"), Split(HAN_AND_KANA), Split(DEEPSEEK_V3)])
        }
        "deepseek-llm" => plain(&[
            Split("[\r\n]"),
            Split(DEEPSEEK_LETTERS),
            Split(DEEPSEEK_PUNCTUATION),
            Split(r"\s+$"),
            Split(DEEPSEEK_CJK),
            Digits,
        ]),
        "deepseek-coder" => {
            plain(&[Split("[\r\n]"), Split(r"\s?\p{L}+"), Split(r"\s?\p{P}+"), Split(DEEPSEEK_CJK), Digits])
        }
        "youtu" => {
            ranked(&[Split("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u{3040}-ゟ゠-ヿ]+"), Split(YOUTU)])
        }
        "bailingmoe" | "bailingmoe2" | "llada-moe" => plain(&[Split(BAILING)]),
        "seed-coder" => plain(&[Split(SEED_CODER)]),
        "exaone-moe" => plain(&[Split(EXAONE_MOE)]),
        "tiny_aya" | "cohere2moe" => composed(&[Split(DIGITS_FROM_THE_RIGHT), Split(GPT4O)]),
        "command-r" => composed(&[Digits, Gpt2]),
        "starcoder" | "refact" | "smollm" | "codeshell" | "exaone" | "minerva-7b" | "mellum2" => plain(&[Digits, Gpt2]),
        "mpt" | "olmo" => composed(&[Gpt2]),
        "gpt-2" | "phi-2" | "gigachat" | "a.x-4.0" | "mellum" | "exaone4" | "jais" | "trillion" | "granite-docling" => {
            plain(&[Gpt2])
        }
        "falcon" => plain(&[Punctuation, Gpt2, Split("[0-9][0-9][0-9]")]),
        _ => return None,
    })
}

/// Whether a begin-of-sequence token comes before texts if the file does not say.
pub(super) fn puts_bos(name: &str) -> bool {
    named(name).is_some_and(|pre| pre.bos)
}

impl Pre {
    /// The pre-tokenizer that a file names.
    pub(super) fn read(metadata: &Metadata) -> Result<Self, Problem> {
        let Some(name) = metadata.text(PRE)? else {
            let problem = "is missing: the file is older than April 2024, and nothing says how its texts are split. Take a newer \
                           file, or the checkpoint that this one was made of";
            return Err(Problem::new(PRE, problem));
        };
        named(name).ok_or_else(|| {
            let problem = format!(
                "is {}, which is not known: convert the checkpoint that this file was made of instead, and please report it",
                shortened(name)
            );
            Problem::new(PRE, problem)
        })
    }

    /// The `normalizer` of tokenizer.json.
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({"type": "NFC"}) } else { Value::Null }
    }

    /// The `pre_tokenizer` of tokenizer.json. Its result is in GPT-2's characters for bytes.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let byte_level = |use_regex: bool| byte_level(use_regex);
        let step = |step: &Step| match step {
            Split(pattern) => {
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
            }
            Digits => json!({"type": "Digits", "individual_digits": true}),
            Punctuation => json!({"type": "Punctuation", "behavior": "Contiguous"}),
            Gpt2 => byte_level(true),
        };
        let mut steps: Vec<Value> = self.steps.iter().map(step).collect();
        if !self.steps.iter().any(|step| matches!(step, Gpt2)) {
            steps.push(byte_level(false));
        }
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// GPT-2's characters for bytes, as a step and as a decoder.
pub(super) fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_named() {
        let value = super::super::super::metadata::Value::String(b"no-such-splitter".to_vec());
        let unknown: Metadata = [(PRE.to_owned(), value)].into_iter().collect();
        let message = Pre::read(&unknown).unwrap_err().to_string();
        assert!(message.contains(PRE) && message.contains("no-such-splitter"), "{message}");
        let message = Pre::read(&Metadata::default()).unwrap_err().to_string();
        assert!(message.contains(PRE) && message.contains("missing"), "{message}");
    }
}
