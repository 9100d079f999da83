//! Patterns of file names, as the hub's programs take them: `*` stands for anything, `/` too, `?` for one character, `[ab]` for one
//! of these.

/// Whether a path matches a pattern.
pub fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let path: Vec<char> = path.chars().collect();
    // Where the last `*` stands, and how much of the path it has swallowed: it swallows more when what follows does not fit.
    let (mut p, mut at, mut star) = (0, 0, None);
    while at < path.len() {
        match one(&pattern[p..], path[at]) {
            _ if pattern.get(p) == Some(&'*') => {
                star = Some((p, at));
                p += 1;
            }
            Some(used) => {
                p += used;
                at += 1;
            }
            None => {
                let Some((place, swallowed)) = star else { return false };
                star = Some((place, swallowed + 1));
                (p, at) = (place + 1, swallowed + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// How much of a pattern stands for this character; `None` if it does not.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern.first()? {
        '?' => Some(1),
        '[' => {
            let negated = matches!(pattern.get(1), Some('!' | '^'));
            let start = if negated { 2 } else { 1 };
            // A bracket that closes nothing stands for itself.
            let Some(end) = pattern.iter().skip(start + 1).position(|&c| c == ']').map(|at| at + start + 1) else {
                return (c == '[').then_some(1);
            };
            let mut set = &pattern[start..end];
            let mut found = false;
            while let Some((&first, rest)) = set.split_first() {
                set = match rest {
                    ['-', last, after @ ..] => {
                        found |= (first..=*last).contains(&c);
                        after
                    }
                    _ => {
                        found |= first == c;
                        rest
                    }
                };
            }
            (found != negated).then_some(end + 1)
        }
        &literal => (literal == c).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_shells_do() {
        let yes = [
            ("*.json", "config.json"),
            ("*", ""),
            ("a*b*c", "aXbYbZc"),
            ("*.gguf", "Q4/x.gguf"),
            ("?.[jt]*", "a.txt"),
            ("[a-c]x", "bx"),
            ("[!a]x", "bx"),
            ("[", "["),
            ("**", "x"),
            ("a]", "a]"),
        ];
        for (pattern, path) in yes {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        let no = [
            ("*.json", "config.jsonl"),
            ("", "x"),
            ("a*b", "ac"),
            ("?", ""),
            ("[!a]x", "ax"),
            ("[a-c]", "d"),
            ("ab", "a"),
        ];
        for (pattern, path) in no {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)));
        assert!(matches(&"*a".repeat(40), &"ba".repeat(40)));
    }
}
