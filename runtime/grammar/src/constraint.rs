//! Which tokens may come next, from one token to the next.

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;
use sluice_generate::Constraint;

use crate::Vocabulary;

/// Most tokens of white space between a marker and the grammar.
const MAX_SPACES: usize = 4;

/// A grammar and its state after the text so far.
pub(crate) struct Matching {
    vocabulary: Vocabulary,
    matcher: Matcher,
    stage: Stage,
}

/// The part of the text that has been reached.
enum Stage {
    /// Before the marker; with how many of its bytes the text ends.
    Free(Free),
    /// After the marker, before the grammar; how many tokens of white space have come.
    Space(Free),
    /// In the grammar.
    Inside,
}

/// Progress in free text, and the marker for which it looks.
struct Free {
    behind: Arc<Behind>,
    count: usize,
}

impl fmt::Debug for Matching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match self.stage {
            Stage::Free(_) => "free",
            Stage::Space(_) => "space",
            Stage::Inside => "inside",
        };
        f.debug_struct("Matching")
            .field("stage", &stage)
            .field("error", &self.matcher.get_error())
            .finish_non_exhaustive()
    }
}

impl Matching {
    pub(crate) fn new(vocabulary: Vocabulary, matcher: Matcher, behind: Option<Arc<Behind>>) -> Self {
        let stage = match behind {
            Some(behind) if behind.marker.is_empty() => Stage::Space(Free { behind, count: 0 }),
            Some(behind) => Stage::Free(Free { behind, count: 0 }),
            None => Stage::Inside,
        };
        Matching { vocabulary, matcher, stage }
    }

    /// Sets the logits of all tokens to minus infinity that are not in `allowed` (bits of words).
    fn apply(&self, allowed: &[u32], logits: &mut [f32]) {
        let known = self.vocabulary.known();
        for (word, logits) in logits.chunks_mut(32).enumerate() {
            let bits = allowed.get(word).copied().unwrap_or(0) & known.get(word).copied().unwrap_or(0);
            match bits {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                _ => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        *logit = if bits & (1 << bit) == 0 { f32::NEG_INFINITY } else { *logit };
                    }
                }
            }
        }
    }

    /// The tokens that the grammar allows; none once it has failed, so that the generation fails too.
    fn allowed(&mut self) -> Vec<u32> {
        self.matcher.compute_mask_or_eos().map(|set| set.as_slice().to_vec()).unwrap_or_default()
    }
}

impl Constraint for Matching {
    fn mask(&mut self, logits: &mut [f32]) {
        let allowed = match &self.stage {
            Stage::Free(free) => free.behind.allowed(&self.vocabulary, free.count),
            Stage::Space(_) => {
                let inside = self.allowed();
                let Stage::Space(free) = &self.stage else { return };
                free.behind.with_spaces(inside, free.count < MAX_SPACES)
            }
            Stage::Inside => self.allowed(),
        };
        self.apply(&allowed, logits);
    }

    fn accept(&mut self, id: u32) {
        match &mut self.stage {
            Stage::Free(free) => match free.behind.follow(free.count, self.vocabulary.bytes(id)) {
                Progress::Within(count) => free.count = count,
                Progress::Found => {
                    self.stage = Stage::Space(Free { behind: free.behind.clone(), count: 0 });
                }
            },
            Stage::Space(free) => {
                let fits = self.matcher.validate_tokens(&[id]).is_ok_and(|count| count == 1);
                let led = free.behind.without_space(id).filter(|_| !fits);
                match free.behind.is_space(id) && !fits {
                    true => free.count += 1,
                    false => {
                        self.stage = Stage::Inside;
                        self.consume(led.unwrap_or(id));
                    }
                }
            }
            Stage::Inside => self.consume(id),
        }
    }

    fn failure(&self) -> Option<String> {
        let error = self.matcher.is_error().then(|| self.matcher.get_error()).flatten();
        error.map(|error| error.lines().next().unwrap_or_default().to_owned())
    }

    fn is_complete(&self) -> bool {
        matches!(self.stage, Stage::Inside) && self.matcher.is_stopped() && !self.matcher.is_error()
    }
}

impl Matching {
    /// A token that does not fit makes the matcher fail, and the next mask allows nothing.
    fn consume(&mut self, id: u32) {
        let failed = self.matcher.consume_token(id).is_err();
        debug_assert!(!failed || self.matcher.is_error());
    }
}

/// Free text up to a marker, prepared for a vocabulary.
pub(crate) struct Behind {
    marker: Vec<u8>,
    /// For each prefix of the marker, by its length: how many bytes at its end repeat its beginning (Knuth, Morris,
    /// Pratt).
    fallback: Vec<usize>,
    /// Tokens, as bits, that complete the marker before their own end, by how many of its bytes stand before them.
    overshooting: Vec<Vec<u32>>,
    /// Tokens of nothing but white space, sorted.
    spaces: Vec<u32>,
    /// Tokens that begin with white space, sorted, each with the token for the text after the white space.
    led: Vec<(u32, u32)>,
}

impl fmt::Debug for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Behind({:?})", String::from_utf8_lossy(&self.marker))
    }
}

enum Progress {
    /// The text ends with this many of the marker's bytes.
    Within(usize),
    /// The marker is complete.
    Found,
}

impl Behind {
    /// Prepares a marker. Without one, the grammar begins at once.
    pub(crate) fn new(vocabulary: &Vocabulary, marker: &str) -> Self {
        let marker = marker.as_bytes().to_vec();
        let mut behind = Behind {
            fallback: fallback(&marker),
            overshooting: Vec::new(),
            spaces: Vec::new(),
            led: Vec::new(),
            marker,
        };
        let size = vocabulary.trie().vocab_size();
        behind.overshooting = vec![vec![0; size.div_ceil(32)]; behind.marker.len()];
        for id in (0_u32..).take(size) {
            let bytes = vocabulary.bytes(id);
            let is_text = !vocabulary.trie().is_special_token(id);
            let counts = if is_text && behind.may_complete(bytes) { 0..behind.marker.len() } else { 0..0 };
            for count in counts {
                if behind.overshoots(count, bytes) {
                    behind.overshooting[count][id as usize / 32] |= 1 << (id % 32);
                }
            }
            let text = without_spaces(bytes);
            match () {
                () if !is_text || text.len() == bytes.len() => {}
                () if text.is_empty() => behind.spaces.push(id),
                () => behind.led.extend(vocabulary.trie().token_id_at_bytes(text).map(|rest| (id, rest))),
            }
        }
        behind
    }

    fn may_complete(&self, bytes: &[u8]) -> bool {
        self.marker.last().is_some_and(|last| bytes.contains(last))
    }

    /// Adds a byte of free text.
    fn step(&self, mut count: usize, byte: u8) -> usize {
        while count > 0 && self.marker.get(count) != Some(&byte) {
            count = self.fallback[count - 1];
        }
        count + usize::from(self.marker.get(count) == Some(&byte))
    }

    /// Whether these bytes complete the marker, and more than white space follows.
    fn overshoots(&self, mut count: usize, bytes: &[u8]) -> bool {
        for (at, &byte) in bytes.iter().enumerate() {
            count = self.step(count, byte);
            if count == self.marker.len() {
                return !without_spaces(&bytes[at + 1..]).is_empty();
            }
        }
        false
    }

    fn follow(&self, mut count: usize, bytes: &[u8]) -> Progress {
        for &byte in bytes {
            count = self.step(count, byte);
            if count == self.marker.len() {
                return Progress::Found;
            }
        }
        Progress::Within(count)
    }

    /// The tokens that free text allows, as bits of words.
    fn allowed(&self, vocabulary: &Vocabulary, count: usize) -> Vec<u32> {
        let mut allowed = vocabulary.known().to_vec();
        if let Some(overshooting) = self.overshooting.get(count) {
            allowed.iter_mut().zip(overshooting).for_each(|(allowed, over)| *allowed &= !over);
        }
        for &id in vocabulary.end() {
            allowed[id as usize / 32] &= !(1 << (id % 32));
        }
        allowed
    }

    /// The tokens with which the grammar can begin, with and without white space before them.
    fn with_spaces(&self, mut allowed: Vec<u32>, more: bool) -> Vec<u32> {
        let has = |set: &[u32], id: u32| set.get(id as usize / 32).is_some_and(|word| word & (1 << (id % 32)) != 0);
        let led: Vec<u32> = self.led.iter().filter(|(_, rest)| has(&allowed, *rest)).map(|&(id, _)| id).collect();
        let spaces = self.spaces.iter().filter(|_| more && !allowed.is_empty());
        for id in led.iter().chain(spaces).copied().collect::<Vec<u32>>() {
            if let Some(word) = allowed.get_mut(id as usize / 32) {
                *word |= 1 << (id % 32);
            }
        }
        allowed
    }

    fn is_space(&self, id: u32) -> bool {
        self.spaces.binary_search(&id).is_ok()
    }

    /// The token for the text after the white space with which a token begins.
    fn without_space(&self, id: u32) -> Option<u32> {
        let at = self.led.binary_search_by_key(&id, |&(id, _)| id).ok()?;
        Some(self.led[at].1)
    }
}

/// The rest after the white space at the beginning. Only the white space of JSON counts.
fn without_spaces(bytes: &[u8]) -> &[u8] {
    let start = bytes.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b'\r'));
    &bytes[start.unwrap_or(bytes.len())..]
}

/// For each prefix of the marker: the length of the longest shorter prefix with which it ends.
fn fallback(marker: &[u8]) -> Vec<usize> {
    let mut table = vec![0; marker.len()];
    let mut count = 0;
    for at in 1..marker.len() {
        while count > 0 && marker[at] != marker[count] {
            count = table[count - 1];
        }
        count += usize::from(marker[at] == marker[count]);
        table[at] = count;
    }
    table
}
