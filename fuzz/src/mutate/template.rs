//! Mutations of chat templates: their pieces are exchanged, so that most of them stay templates.

use super::random::Random;

/// What templates are made of, beside what the seeds have: tags, expressions, and what costs much.
const FRAGMENTS: [&str; 60] = [
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{{ tools | tojson(indent=4) }}",
    "{{ bos_token + eos_token }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}",
    "{% for c in 'abc' * 100 %}",
    "{% for i in range(1000) %}",
    "{{ loop.index0 ~ loop.previtem }}",
    "{% if loop.last %}",
    "{% if messages[-1].role == 'user' %}",
    "{% elif true %}",
    "{% else %}",
    "{% endif %}",
    "{% set x = 'ab' %}",
    "{% set ns = namespace(a=0, b=[]) %}",
    "{% set ns.a = ns.a + 1 %}",
    "{% set ns.b = ns.b + ns.b + [1] %}",
    "{% set x = x ~ x %}",
    "{% set x %}",
    "{% endset %}",
    "{% macro f(a, b=1) %}",
    "{% endmacro %}",
    "{{ f(1, b=2) }}",
    "{% macro g(n) %}{{ g(n + 1) }}{% endmacro %}{{ g(0) }}",
    "{% call f(1) %}",
    "{% endcall %}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{% raw %}",
    "{% endraw %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{% continue %}",
    "{# note #}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y-%m-%d %H:%M') }}",
    "{{ 'a' in messages[0].content }}",
    "{{ x.split('a')[-1].strip().lstrip('b') }}",
    "{{ x | replace('a', 'aaaa') }}",
    "{{ x.format(1) }}",
    "{{ '%s' % x }}",
    "{{ x[::-1] }}",
    "{{ x[1:3:0] }}",
    "{{ 9999999999 * 9999999999 }}",
    "{{ 2 ** 200 }}",
    "{{ 1 // 0 }}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ 7 % 0 }}",
    "{{ x.center(99999999) }}",
    "{{ 'a' * 999999999 }}",
    "{{ range(99999999) | list }}",
    "{{ x | indent(99999999) }}",
    "{{ x | tojson | safe }}",
    "{{ messages | map(attribute='role') | list | sort | unique | join(',') }}",
    "{{ messages | selectattr('role') }}",
    "{{ x is string and x is defined and x is mapping }}",
    "{{ {'a': [1, {'b': none}]}.items() | list | last }}",
];

/// Words and signs inside tags.
const WORDS: [&str; 40] = [
    "messages",
    "message",
    "content",
    "role",
    "tools",
    "loop",
    "not",
    "in",
    "is",
    "and",
    "or",
    "if",
    "else",
    "none",
    "true",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ".",
    ",",
    "|",
    "+",
    "-",
    "*",
    "//",
    "%",
    "~",
    "==",
    "<=",
    ":",
    "'",
    "\"",
    "0",
    "-1",
    "99999999999",
    "|tojson",
    "|length",
];

/// The pieces of a template: its tags, and the texts between.
fn pieces(source: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = source;
    while !rest.is_empty() {
        let end = match rest.get(..2) {
            Some("{{") => rest.find("}}").map(|at| at + 2),
            Some("{%") => rest.find("%}").map(|at| at + 2),
            Some("{#") => rest.find("#}").map(|at| at + 2),
            _ => rest[rest.chars().next().map_or(0, char::len_utf8)..].find('{').map(|at| at + 1),
        };
        let (piece, after) = rest.split_at(end.unwrap_or(rest.len()).max(1));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// A template with a few pieces exchanged for others: its own, those of `sound` templates, and [`FRAGMENTS`].
pub(crate) fn mutate(source: &str, sound: &[String], random: &mut Random) -> String {
    let mut all: Vec<String> = pieces(source).into_iter().map(str::to_owned).collect();
    for _ in 0..1 + random.below(4) {
        let at = random.below(all.len());
        let spare = match random.below(4) {
            0 => random.pick(&all).cloned(),
            1 => random.pick(sound).map(|s| random.pick(&pieces(s)).copied().unwrap_or("").to_owned()),
            _ => random.pick(&FRAGMENTS).map(|&s| s.to_owned()),
        };
        let spare = spare.unwrap_or_default();
        match random.below(6) {
            0 if !all.is_empty() => drop(all.remove(at)),
            1 if !all.is_empty() => all[at] = spare,
            2 if !all.is_empty() => {
                let other = random.below(all.len());
                all.swap(at, other);
            }
            3 if !all.is_empty() => all[at] = words(&all[at], random),
            _ => all.insert(at, spare),
        }
    }
    all.concat()
}

/// A piece with one of its words exchanged.
fn words(piece: &str, random: &mut Random) -> String {
    let word = random.pick(&WORDS).copied().unwrap_or("");
    let starts: Vec<usize> = piece.char_indices().filter(|(_, c)| !c.is_alphanumeric()).map(|(at, _)| at).collect();
    let Some(&from) = random.pick(&starts) else { return format!("{piece}{word}") };
    let to = starts.iter().copied().find(|&at| at > from).unwrap_or(piece.len());
    // The sign before the word stays, or goes with it.
    let keep = piece[from..].chars().next().filter(|_| !random.one_in(3)).map_or(0, char::len_utf8);
    format!("{}{}{}", &piece[..from + keep], word, &piece[to.max(from + keep)..])
}
