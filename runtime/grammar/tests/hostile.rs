//! Schemas, regular expressions and grammars of strangers: an answer or an error, never a crash.

use std::sync::OnceLock;

use crate::common::{Outcome, Random, published};
use proptest::prelude::*;
use serde_json::{Value, json};
use sluice_grammar::{Form, Grammar, GrammarError, Vocabulary, is_valid};
use sluice_text::Tokenizer;

fn model() -> &'static (Tokenizer, Vocabulary) {
    static MODEL: OnceLock<(Tokenizer, Vocabulary)> = OnceLock::new();
    MODEL.get_or_init(|| published("qwen2"))
}

fn compile(form: Form) -> Result<Grammar, GrammarError> {
    Grammar::compile(&model().1, &form)
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-20_i64..20).prop_map(Value::from),
        (-40_i32..40).prop_map(|n| Value::from(f64::from(n) / 4.0)),
        "[ab\"\\\\é\n]{0,3}".prop_map(Value::from),
    ]
}

/// Keywords with values that often make sense.
fn keyword(inner: BoxedStrategy<Value>) -> impl Strategy<Value = (String, Value)> {
    let count = (0_u64..4).prop_map(Value::from);
    let list = || prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from);
    let map = || {
        let pairs = prop::collection::vec(("[abx]|\\^a|b\\$", inner.clone()), 0..3);
        pairs.prop_map(|pairs| Value::Object(pairs.into_iter().collect()))
    };
    let named = |names: &'static [&'static str], value: BoxedStrategy<Value>| {
        (prop::sample::select(names), value).prop_map(|(name, value)| (name.to_owned(), value))
    };
    let types = prop::sample::select(&["null", "boolean", "integer", "number", "string", "array", "object"][..]);
    let names = prop::collection::vec("[abx]", 0..3).prop_map(Value::from);
    prop_oneof![
        4 => named(&["type"], types.prop_map(Value::from).boxed()),
        2 => named(&["allOf", "anyOf", "oneOf", "prefixItems"], list().boxed()),
        2 => named(&["not", "if", "then", "else", "items", "contains", "propertyNames", "additionalProperties",
            "unevaluatedProperties", "unevaluatedItems"], inner.clone()),
        3 => named(&["properties", "patternProperties", "dependentSchemas", "$defs"], map().boxed()),
        2 => named(&["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
            "maxContains"], count.boxed()),
        2 => named(&["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const"], scalar().boxed()),
        1 => named(&["enum"], prop::collection::vec(scalar(), 0..4).prop_map(Value::from).boxed()),
        1 => named(&["required"], names.boxed()),
        1 => named(&["pattern"], prop::sample::select(&["^a", "b$", "^[ab]+$", "\"", ".", "(a|b)?"][..]).prop_map(Value::from).boxed()),
        1 => named(&["$ref"], prop::sample::select(&["#", "#/$defs/a", "#/properties/b", "#/nothing"][..]).prop_map(Value::from).boxed()),
        1 => named(&["uniqueItems"], Just(Value::from(true)).boxed()),
        1 => named(&["type", "enum", "properties", "items", "required", "$ref", "pattern", "minimum"], scalar().boxed()),
    ]
}

fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![any::<bool>().prop_map(Value::from), Just(json!({})), Just(json!({"type": "string"}))];
    leaf.boxed().prop_recursive(4, 40, 4, |inner| {
        let pairs = prop::collection::vec(keyword(inner.boxed()), 0..5);
        pairs.prop_map(|pairs| Value::Object(pairs.into_iter().collect()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn texts_by_any_schema_are_valid(schema in schema(), seed in any::<u32>()) {
        let (tokenizer, vocabulary) = model();
        if let Ok(grammar) = compile(Form::JsonSchema(schema.clone())) {
            let random = Random::new(tokenizer, vocabulary);
            for seed in [2 * u64::from(seed), 2 * u64::from(seed) + 1] {
                let (_, outcome) = random.write(&grammar, seed, 150);
                prop_assert!(!matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
                if let Outcome::Ended(text) = outcome {
                    let value: Value = serde_json::from_str(&text).unwrap();
                    // Parts that the grammar has no use for may be malformed.
                    prop_assert_ne!(is_valid(&schema, &value), Ok(false), "{}", text);
                }
            }
        }
    }

    #[test]
    fn any_regular_expression_is_matched_or_refused(regex in "[ab.()|*+?\\[\\]^${}0-9,\\\\/dws-]{0,12}", seed in any::<u32>()) {
        let (tokenizer, vocabulary) = model();
        if let Ok(grammar) = compile(Form::Regex(regex.clone())) {
            let random = Random::new(tokenizer, vocabulary);
            let (_, outcome) = random.write(&grammar, seed.into(), 60);
            prop_assert!(!matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
            if let Outcome::Ended(text) = outcome {
                let whole = regex::Regex::new(&format!("^(?:{regex})$")).unwrap();
                prop_assert!(whole.is_match(&text), "{:?}", text);
            }
        }
    }

    #[test]
    fn any_grammar_is_an_answer_or_an_error(
        parts in prop::collection::vec(prop::sample::select(&[
            "start: ", "a", "b: ", "A", "B: ", "\"x\"", "/[a-z]/", "/(", "\n", "(", ")", "[", "]", "{", "}", "{2,3}", "~", "&",
            "|", "*", "+", "?", "%json {\"type\": \"integer\"}", "%json {", "%lark {", "%regex {\"substring_chars\": \"abc\"}",
            "%ignore ", "%llguidance {\"no_forcing\": true}", "<|im_start|>", "<[1-5]>", "<[^1]>", "<[*]>", "@x", "::", "_", "#",
            "//", "start", "[stop=\"x\"]", "[max_tokens=3]", "[capture]", " ", "\u{0}", "é",
        ][..]), 0..24),
        seed in any::<u32>(),
    ) {
        let (tokenizer, vocabulary) = model();
        for text in [parts.concat(), format!("start: {}", parts.join(" "))] {
            if let Ok(grammar) = compile(Form::Lark(text)) {
                let random = Random::new(tokenizer, vocabulary);
                random.write(&grammar, seed.into(), 30);
            }
        }
    }

    #[test]
    fn markers_are_found_wherever_they_begin(marker in "[ab<]{1,5}", before in "[ab<]{0,12}") {
        let (tokenizer, vocabulary) = model();
        let grammar = Grammar::compile(vocabulary, &Form::Text("{}".into())).unwrap().behind(&marker);
        let mut constraint = grammar.constraint();
        let text = format!("{before}{marker}");
        let first = text.find(&marker).unwrap() + marker.len();
        // One character at a time, so that nothing overshoots.
        for c in text[..first].chars() {
            let id = tokenizer.token_id(&c.to_string()).unwrap();
            let mut logits = vec![0.0; tokenizer.vocab_size()];
            constraint.mask(&mut logits);
            prop_assert!(logits[id as usize].is_finite());
            constraint.accept(id);
        }
        let random = Random::new(tokenizer, vocabulary);
        let (_, outcome) = random.write_with(constraint.as_mut(), 0, 20);
        prop_assert!(matches!(&outcome, Outcome::Ended(text) if text.trim_start() == "{}"), "{:?}", outcome);
    }
}

/// `SLUICE_SCHEMA_CASES` is how many of each.
fn cases() -> u32 {
    std::env::var("SLUICE_SCHEMA_CASES").map_or(60, |cases| cases.parse().expect("a number"))
}

#[test]
fn what_asks_for_too_much_is_refused() {
    let mut deep = json!({});
    for _ in 0..90 {
        deep = json!({"items": deep});
    }
    let pairs = |count: usize| (0..count).map(|at| (format!("p{at}"), json!({"type": "string"})));
    let wide: serde_json::Map<String, Value> = pairs(5000).collect();
    let one: Vec<Value> =
        (0..40).map(|at| json!({"properties": {format!("p{at}"): {"minLength": at}, "x": {}}})).collect();
    let all: Vec<Value> =
        (0..12).map(|at| json!({"anyOf": [{"minLength": at}, {"maxLength": at}, {"pattern": "a"}]})).collect();
    let chain: serde_json::Map<String, Value> =
        (0..5000).map(|at| (format!("d{at}"), json!({"items": {"$ref": format!("#/$defs/d{}", at + 1)}}))).collect();
    for (schema, fine) in [
        (deep.clone(), Some(true)),
        (
            json!({"items": {"items": {"items": deep}}, "not": {"items": {"items": {"items": {"items": {"items": 1}}}}}}),
            None,
        ),
        (json!({"properties": wide, "required": ["p0"], "type": "object"}), Some(false)),
        (json!({"oneOf": one, "type": "object"}), None),
        (json!({"allOf": all, "type": "string"}), Some(false)),
        (json!({"$ref": "#/$defs/d0", "$defs": chain}), None),
        (json!({"$ref": "#"}), None),
        (json!({"allOf": [{"$ref": "#"}], "type": "string"}), None),
        (json!({"type": "array", "minItems": 1_000_000_000_u64}), Some(false)),
        (json!({"type": "array", "maxItems": 1_000_000_000_u64}), Some(true)),
        (json!({"type": "string", "minLength": 1_000_000_000_u64}), Some(false)),
        (json!({"type": "string", "maxLength": 1_000_000_000_u64}), Some(true)),
        (json!({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}), None),
        (json!({"type": "string", "pattern": "(a|b)*a(a|b){20}c(a|b){20}", "minLength": 100, "maxLength": 500}), None),
        (json!({"enum": (0..100_000).collect::<Vec<_>>()}), None),
        (json!({"type": "object", "minProperties": 3}), Some(false)),
        (json!({"type": "integer", "minimum": 1e300}), Some(false)),
        (json!({"type": "integer", "multipleOf": 997}), Some(true)),
        (json!({"multipleOf": 123_456_789}), Some(true)),
        (json!({"multipleOf": 0.123_456_789}), Some(true)),
        (json!({"$ref": "file:///etc/passwd"}), Some(false)),
        (json!({"$ref": "http://127.0.0.1/schema"}), Some(false)),
        (json!({"x-guidance": {"lenient": true}, "type": "string", "not": {"const": "a"}}), Some(true)),
    ] {
        let result = compile(Form::JsonSchema(schema.clone()));
        let text = schema.to_string().chars().take(100).collect::<String>();
        if let Some(fine) = fine {
            assert_eq!(result.is_ok(), fine, "{text}: {:?}", result.err());
        }
        if let Err(error) = result {
            let message = error.to_string();
            assert!(message.len() < 700 && !message.contains("backtrace"), "{text}: {message}");
        }
    }
    let chain: String = (0..3900).map(|at| format!("r{at}: r{}\n", at + 1)).collect();
    assert!(compile(Form::Lark(format!("start: r0\n{chain}r3900: \"x\"\n"))).is_ok());
    let wide: String = (0..20_000).map(|at| format!(" | \"{at}\"")).collect();
    assert!(compile(Form::Lark(format!("start: \"x\"{wide}"))).is_ok());
    for regex in ["((a{1,100}){1,100}){1,100}", "(a|b)*a(a|b){100}", "[a-z]{1,100000}"] {
        let _ = compile(Form::Regex(regex.into()));
    }
}
