//! What there is to do in a batch: the requests that have no result yet, how long they are, and which of them cannot be answered.

use std::path::Path;
use std::sync::Arc;

use crate::error::CliError;
use crate::progress::step_bar;
use serde_json::{Value, json};
use sluice_batch::{Access, Earlier, Entry, Failed, Files as _, Index, Line, Named, OpenFile, SystemFiles};
use sluice_format::ModelFile;
use sluice_kernels::ThreadPool;
use sluice_lab::batch::Load;
use sluice_lab::course::Item;
use sluice_server::batch::{Expected, check};
use sluice_server::texts::{Texts, now};

/// Requests whose texts are turned into tokens, to know how many tokens a byte is: the longest, and some of all others.
const LONGEST: usize = 16;
const OTHERS: usize = 48;
/// Bytes of each of them that are looked at.
const LOOK: usize = 64 << 10;
/// Tokens of an answer whose request does not limit it: what is planned for, and what a context is given room for.
pub(crate) const USUAL_ANSWER: f64 = 1024.0;
const LONG_ANSWER: f64 = 4096.0;
/// Tokens that a template adds, with room to spare.
const TEMPLATE: f64 = 256.0;
/// Contexts are multiples of this many tokens, so that an input that changes a little needs the same.
const STEP: usize = 256;
/// Most bytes of requests that a plan turns into tokens. Of a larger input, as many requests as these are, from all of its parts.
const CHECKED: u64 = 64 << 20;
/// Requests that one thread checks before it takes others.
const BLOCK: usize = 32;
/// Most requests that are named because they cannot be answered.
const NAMED: usize = 8;

/// A request without a result.
#[derive(Clone, Copy, Debug)]
struct Wish {
    /// Tokens of its prompts, and of what earlier runs have generated.
    read: f64,
    answers: usize,
    /// Most tokens that are left to generate for each answer, and whether the request limits them.
    most: f64,
    limited: bool,
    /// Of each answer, tokens that earlier runs have generated.
    generated: f64,
}

/// How long answers are taken to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    /// As long as they may become.
    Longest,
    /// As long as a request allows; a usual number where a request sets no limit.
    Allowed,
    /// As long as those of the results so far, where there are any.
    Likely,
}

/// What is left to do.
pub(crate) struct Rest {
    context: usize,
    wishes: Vec<Wish>,
    /// What earlier runs have done.
    pub(crate) earlier: Option<Earlier>,
    /// Whether each request was checked, and turned into tokens.
    exact: bool,
    /// The first requests that cannot be answered, and how many there are.
    pub(crate) wrong: (Vec<Failed>, usize),
}

impl Rest {
    /// Estimates what is left of an input from its bytes; lines that are no requests are none of it. `context`: most tokens of a request and its
    /// answer.
    pub(crate) fn estimate(scale: &Scale, index: &Index, context: usize, earlier: Option<Earlier>) -> Self {
        let mut rest = Rest { context, wishes: Vec::new(), earlier, exact: false, wrong: (Vec::new(), 0) };
        for number in rest.open(index) {
            let entry = &index.entries[number as usize];
            if entry.wanted.answers > 0 {
                let wish = rest.estimated(number, entry, scale.mean);
                rest.wishes.push(wish);
            }
        }
        rest
    }

    /// The same, but requests are checked and turned into tokens, as far as the input is not too large for that. A run and a dry run both plan
    /// with this, so both know which requests cannot be answered. It takes all threads of `pool`: tokenizers do a few megabytes per second each.
    pub(crate) fn checked(
        self,
        file: &ModelFile,
        (path, index): (&Path, &Index),
        pool: &ThreadPool,
    ) -> Result<Self, CliError> {
        let texts = Texts::of(file, self.context, None).map(Arc::new)?;
        let open = self.open(index);
        let bytes: u64 = open.iter().map(|&n| u64::from(index.entries[n as usize].bytes.unwrap_or(0))).sum();
        let every = (bytes.div_ceil(CHECKED) as usize).max(1);
        // With their places in the order.
        let sample: Vec<(usize, u32)> = open.iter().copied().enumerate().step_by(every).collect();
        let blocks: Vec<&[(usize, u32)]> = sample.chunks(BLOCK).collect();
        let mut found: Vec<Option<Result<Found, CliError>>> = blocks.iter().map(|_| None).collect();
        let bar = step_bar("reading the requests", sample.len() as u64);
        pool.for_each_piece(&mut found, 1, &|at, found| {
            found[0] = Some(self.check(&texts, (path, index), blocks[at]));
            bar.inc(blocks[at].len() as u64);
        });
        bar.finish_and_clear();
        let mut all = Found::default();
        for found in found.into_iter().flatten() {
            all.add(found?);
        }
        // Of the checked ones, to estimate the others.
        let mean = if all.text > 0.0 { all.tokens / all.text } else { 0.0 };
        for (at, &number) in open.iter().enumerate().filter(|(at, _)| at % every != 0) {
            let entry = &index.entries[number as usize];
            if entry.wanted.answers > 0 {
                all.wishes.push((at, self.estimated(number, entry, mean)));
            }
        }
        all.wishes.sort_by_key(|(at, _)| *at);
        let wishes = all.wishes.into_iter().map(|(_, wish)| wish).collect();
        Ok(Rest { wishes, exact: every == 1, wrong: (all.wrong, all.failed), ..self })
    }

    /// Checks some requests, given by their places in the order and their numbers.
    fn check(
        &self,
        texts: &Arc<Texts>,
        (path, index): (&Path, &Index),
        requests: &[(usize, u32)],
    ) -> Result<Found, CliError> {
        let input = open_input(path)?;
        let mut found = Found::default();
        for &(at, number) in requests {
            let entry = &index.entries[number as usize];
            let line = Index::line(path, &*input, entry)?;
            match line.map_err(|error| (error.custom_id, error.message)).and_then(|line| expected(&line, texts)) {
                Ok(prompts) => {
                    found.text += f64::from(entry.wanted.text_bytes);
                    found.tokens += prompts.iter().map(|prompt| prompt.prompt as f64).sum::<f64>();
                    let answers: usize = prompts.iter().map(|prompt| prompt.answers).sum();
                    let generated = self.generated(number) / answers.max(1) as f64;
                    found.wishes.extend(prompts.iter().map(|prompt| (at, Wish::of(prompt, generated))));
                }
                Err((custom_id, message)) => {
                    let request = Named { line: entry.line, custom_id };
                    found.add(Found { wrong: vec![Failed { request, message }], failed: 1, ..Found::default() });
                }
            }
        }
        Ok(found)
    }

    /// Requests that have failed in earlier runs, and those that cannot be answered.
    pub(crate) fn failures(&self) -> usize {
        self.earlier.as_ref().map_or(0, |earlier| earlier.failed) + self.wrong.1
    }

    /// Whether each request has a result.
    pub(crate) fn is_finished(&self) -> bool {
        self.earlier.as_ref().is_some_and(|earlier| earlier.finished == earlier.done.len())
    }

    /// Numbers of the requests without a result, in the order in which they are answered.
    fn open(&self, index: &Index) -> Vec<u32> {
        let is_done = |number: u32| self.earlier.as_ref().is_some_and(|earlier| earlier.done[number as usize]);
        index.order.iter().copied().filter(|&number| !is_done(number)).collect()
    }

    /// Tokens that earlier runs have generated for a request.
    fn generated(&self, number: u32) -> f64 {
        let sampled = self.earlier.as_ref().and_then(|earlier| earlier.sampled.get(&number));
        sampled.map_or(0.0, |sampled| *sampled as f64)
    }

    fn estimated(&self, number: u32, entry: &Entry, tokens_per_byte: f64) -> Wish {
        let context = self.context as f64;
        let prompt = (f64::from(entry.wanted.text_bytes) * tokens_per_byte).min(context);
        let (room, answers) = (context - prompt, entry.wanted.answers as usize);
        let generated = self.generated(number) / answers as f64;
        let most = entry.wanted.max_tokens.map_or(room, |most| f64::from(most).min(room));
        Wish {
            read: prompt + generated * answers as f64,
            answers,
            most: (most - generated).max(0.0),
            limited: entry.wanted.max_tokens.is_some(),
            generated,
        }
    }

    /// Mean number of tokens of the answers so far.
    pub(crate) fn mean_answer(&self) -> Option<f64> {
        let earlier = self.earlier.as_ref().filter(|earlier| earlier.answers > 0)?;
        Some(earlier.generated as f64 / earlier.answers as f64)
    }

    /// Whether there are answers without a limit.
    fn unlimited(&self) -> usize {
        self.wishes.iter().filter(|wish| !wish.limited).map(|wish| wish.answers).sum()
    }

    fn tokens(&self, wish: &Wish, length: Length) -> f64 {
        let allowed = if wish.limited { wish.most } else { (USUAL_ANSWER - wish.generated).clamp(0.0, wish.most) };
        match (length, self.mean_answer()) {
            (Length::Longest, _) => wish.most,
            (Length::Likely, Some(mean)) => (mean - wish.generated).clamp(0.0, wish.most),
            (Length::Allowed | Length::Likely, _) => allowed,
        }
    }

    /// The requests together.
    pub(crate) fn load(&self, length: Length) -> Load {
        let answers = self.wishes.iter().map(|wish| wish.answers).sum();
        // Answers to one prompt share what was read of it. These are estimates: fractions of tokens would only look precise.
        let prompt_tokens = self.wishes.iter().map(|wish| wish.read).sum::<f64>().round();
        let tokens = self.wishes.iter().map(|wish| wish.answers as f64 * self.tokens(wish, length));
        // The sum of nothing is -0.
        let answer_tokens = tokens.sum::<f64>().round().max(0.0);
        Load { answers, prompt_tokens, answer_tokens, unlimited: self.unlimited(), context: self.context }
    }

    /// The requests one by one.
    pub(crate) fn items(&self, length: Length) -> Vec<Item> {
        let item = |wish: &Wish| Item { prompt: wish.read, answers: wish.answers, tokens: self.tokens(wish, length) };
        self.wishes.iter().map(item).collect()
    }

    /// Whether all requests were checked, and their tokens counted.
    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Value {
        let earlier = self.earlier.as_ref();
        json!({
            "finished": earlier.map_or(0, |earlier| earlier.finished),
            "failed": earlier.map_or(0, |earlier| earlier.failed),
            "mean_answer": self.mean_answer(),
            "exact": self.exact,
            "wrong": self.wrong.1,
            "wrong_requests": self.wrong.0,
        })
    }
}

/// What a check of requests has found.
#[derive(Default)]
struct Found {
    /// With the places of their requests in the order.
    wishes: Vec<(usize, Wish)>,
    /// Bytes and tokens of the prompts.
    text: f64,
    tokens: f64,
    /// The first requests in the input that cannot be answered, and how many there are.
    wrong: Vec<Failed>,
    failed: usize,
}

impl Found {
    fn add(&mut self, other: Found) {
        self.wishes.extend(other.wishes);
        self.text += other.text;
        self.tokens += other.tokens;
        self.failed += other.failed;
        self.wrong.extend(other.wrong);
        self.wrong.sort_by_key(|failed| failed.request.line);
        self.wrong.truncate(NAMED);
    }
}

impl Wish {
    /// `generated`: tokens that earlier runs have generated for each answer.
    fn of(prompt: &Expected, generated: f64) -> Self {
        Wish {
            read: prompt.prompt as f64 + generated * prompt.answers as f64,
            answers: prompt.answers,
            most: (prompt.most as f64 - generated).max(0.0),
            limited: prompt.limited,
            generated,
        }
    }
}

/// The prompts of a request; its name, and what is wrong with it.
fn expected(line: &Line, texts: &Arc<Texts>) -> Result<Vec<Expected>, (String, String)> {
    check(line, texts, now()).map_err(|error| (line.custom_id.clone(), error.message))
}

/// Opens the input.
fn open_input(path: &Path) -> Result<Box<dyn OpenFile>, CliError> {
    SystemFiles.open(path, Access::Read).map_err(CliError::file(path, "read the requests"))
}

/// Tokens of a byte of the requests' texts.
pub(crate) struct Scale {
    /// In the mean.
    mean: f64,
    most: f64,
}

impl Scale {
    /// By the longest requests of an input, and some of the others.
    pub(crate) fn of(file: &ModelFile, path: &Path, index: &Index) -> Result<Self, CliError> {
        /// What token ids in JSON take.
        const IDS: f64 = 0.5;
        let Some(tokenizer) = crate::engine_args::tokenizer(file)? else { return Ok(Scale { mean: IDS, most: IDS }) };
        let input = open_input(path)?;
        let mut longest: Vec<&Entry> = index.entries.iter().collect();
        longest.sort_by_key(|entry| std::cmp::Reverse(entry.wanted.text_bytes));
        longest.truncate(LONGEST);
        let others = index.entries.iter().step_by(index.entries.len().div_ceil(OTHERS).max(1));
        let (mut bytes, mut tokens, mut most) = (0, 0, 0.0_f64);
        for entry in longest.into_iter().chain(others) {
            // What is wrong with a line is said in its result.
            let Ok(line) = Index::line(path, &*input, entry)? else { continue };
            let text = line.text();
            let end = (0..=text.len().min(LOOK)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            let Ok(ids) = tokenizer.encode(&text[..end], false) else { continue };
            if end > 0 {
                (bytes, tokens) = (bytes + end, tokens + ids.len());
                most = most.max(ids.len() as f64 / end as f64);
            }
        }
        // A short text says little, and token ids in JSON are not what is read.
        Ok(match bytes {
            0 => Scale { mean: IDS, most: IDS },
            bytes => Scale { mean: tokens as f64 / bytes as f64, most: most.max(IDS / 2.0) },
        })
    }

    /// Most tokens of a request and its answer: `asked`, or what the longest request needs, as far as the model allows it.
    pub(crate) fn context(&self, file: &ModelFile, index: &Index, asked: Option<usize>) -> usize {
        let needed = |entry: &Entry| {
            let answer = entry.wanted.max_tokens.map_or(LONG_ANSWER, f64::from);
            f64::from(entry.wanted.text_bytes) * self.most + TEMPLATE + answer
        };
        let requests = index.entries.iter().filter(|entry| entry.wanted.answers > 0);
        let needed = requests.map(needed).fold(1.0, f64::max) as usize;
        asked.unwrap_or_else(|| needed.next_multiple_of(STEP)).min(file.spec().max_positions.max(1))
    }
}
