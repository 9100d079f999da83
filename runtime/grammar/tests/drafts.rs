//! Generations with a grammar and proposed tokens: the text is the same as without these, and has its form.

use crate::common::{hash, published};
use serde_json::{Value, json};
use sluice_generate::{Draft, Finish, Generation, PromptLookup, Request, Shape};
use sluice_grammar::{Form, Grammar, is_valid};
use sluice_text::StopCondition;

/// Logits behind a context, always the same: by chance from the two latest tokens, and slowly tending to an end.
fn logits(context: &[u32], ranks: &[f32]) -> Vec<f32> {
    let latest = context.iter().rev().take(2).fold(0, |sum, &id| sum << 20 ^ u64::from(id));
    let hurry = context.len() as f32 / 200.0;
    let chance = |id: usize| hash(latest << 20 ^ id as u64) as f32 / u64::MAX as f32;
    ranks.iter().enumerate().map(|(id, rank)| chance(id) + rank * hurry).collect()
}

/// Runs a generation as an engine does. The tokens, how many proposals came true, and why it ended.
fn run(request: Request, shape: &Shape, ranks: &[f32]) -> (Vec<u32>, u64, Option<Finish>) {
    let mut context = request.prompt.clone();
    let mut generation = Generation::new(request, shape).unwrap();
    let mut position = 0;
    while generation.finish().is_none() {
        generation.draft(position, 6).unwrap();
        let tokens = generation.offer(position).0.to_vec();
        context.truncate(position);
        let is_draft = position > 0 && tokens.len() > 1;
        for (index, &id) in tokens.iter().enumerate() {
            context.push(id);
            if is_draft {
                generation.accept_draft(index, &logits(&context, ranks), &mut |_| {}).unwrap();
            }
        }
        if !is_draft {
            generation.accept(&logits(&context, ranks), &mut |_| {}).unwrap();
        }
        position = generation.take_back_to().unwrap_or(context.len());
    }
    (generation.generated().to_vec(), generation.proposals().1, generation.finish())
}

#[test]
fn proposals_change_nothing() {
    let (tokenizer, vocabulary) = published("qwen2");
    let end = tokenizer.end_token().unwrap();
    let rank = |id: u32| match tokenizer.token_bytes(id).unwrap().as_deref() {
        _ if id == end => 4.0,
        Some(b"\"") => 3.0,
        Some(b"}" | b"]") => 2.0,
        _ => 0.0,
    };
    let mut ranks: Vec<f32> = (0..tokenizer.vocab_size() as u32).map(rank).collect();
    ranks.push(0.0);
    let (vocab, tokens) = (ranks.len(), Some(tokenizer.clone()));
    let shape = Shape { vocab, context: 2000, most_context: 2000, tokenizer: tokens, phases: false };
    let schema = json!({
        "type": "array", "minItems": 3, "maxItems": 8,
        "items": {"type": "object", "properties": {"name": {"enum": ["first", "second"]}, "size": {"type": "integer"}},
            "required": ["name", "size"], "additionalProperties": false},
    });
    let grammar = Grammar::compile(&vocabulary, &Form::JsonSchema(schema.clone())).unwrap();
    let prompt = tokenizer.encode("[{\"name\":\"first\",\"size\":1},{\"name\":\"second\",\"size\":2}]", false).unwrap();
    let mut true_ones = 0;
    for seed in 0..8 {
        let request = |draft: Option<Box<dyn Draft>>| Request {
            constraint: Some(grammar.constraint()),
            stop: StopCondition::new(vec![end], Vec::new()).unwrap(),
            draft,
            ..Request::new([prompt.as_slice(), &[seed]].concat(), 900)
        };
        let (plain, _, finish) = run(request(None), &shape, &ranks);
        let lookup = PromptLookup { most: 6, longest: 4, least: 1 };
        let (drafted, came_true, drafted_finish) = run(request(Some(Box::new(lookup))), &shape, &ranks);
        assert_eq!((&plain, finish), (&drafted, drafted_finish));
        assert!(matches!(finish, Some(Finish::Complete | Finish::EndToken)), "{finish:?}");
        true_ones += came_true;
        let text = tokenizer.decode(&plain, true).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(is_valid(&schema, &value), Ok(true), "{text}");
    }
    assert!(true_ones > 0);
}

#[test]
fn a_generation_fails_where_nothing_can_follow() {
    let (tokenizer, vocabulary) = published("qwen2");
    let grammar = Grammar::compile(&vocabulary, &Form::Regex("[a-c]{40}".into())).unwrap();
    // A constraint that has been told of a token that does not fit.
    let mut constraint = grammar.constraint();
    constraint.accept(tokenizer.token_id("z").unwrap());
    let (vocab, tokens) = (tokenizer.vocab_size(), Some(tokenizer.clone()));
    let shape = Shape { vocab, context: 100, most_context: 100, tokenizer: tokens, phases: false };
    let request = Request { constraint: Some(constraint), ..Request::new(vec![1], 10) };
    let mut generation = Generation::new(request, &shape).unwrap();
    assert!(generation.accept(&vec![0.0; shape.vocab], &mut |_| {}).is_err());
}
