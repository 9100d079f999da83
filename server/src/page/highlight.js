// Colours for code: a small tokenizer that knows comments, strings, numbers, keywords and calls. It goes over the text once: whatever an
// expression may give up after, it has a bounded length.

/** Longer code is shown without colours, in characters. */
const LONGEST = 100_000;

const words = (text) => new Set(text.split(" "));

const STRINGS = String.raw`"(?:[^"\\\n]|\\[\s\S])*"?|'(?:[^'\\\n]|\\[\s\S])*'?`;
const BACKTICKS = "`(?:[^`\\\\]|\\\\[\\s\\S])*`?";
const TRIPLES = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)`;
const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASHES = "#[^\\n]*";

const C_WORDS =
  "auto break case char const continue default do double else enum extern float for goto if inline int long register restrict return " +
  "short signed sizeof static struct switch typedef union unsigned void volatile while";

const LANGUAGES = {
  javascript: {
    comments: SLASHES,
    strings: `${STRINGS}|${BACKTICKS}`,
    keywords: words(
      "abstract any as async await boolean break case catch class const continue declare default delete do else enum export extends " +
        "false finally for from function get if implements import in instanceof interface keyof let namespace never new null number of " +
        "private protected public readonly return satisfies set static string super switch this throw true try type typeof undefined " +
        "unknown var void while yield",
    ),
  },
  python: {
    comments: HASHES,
    strings: `[bBfFrRuU]{0,2}(?:${TRIPLES}|${STRINGS})`,
    keywords: words(
      "and as assert async await break case class continue def del elif else except False finally for from global if import in is " +
        "lambda match None nonlocal not or pass raise return self True try while with yield",
    ),
  },
  rust: {
    comments: SLASHES,
    strings: String.raw`b?r#"[\s\S]*?(?:"#|$)|b?"(?:[^"\\]|\\[\s\S])*"?|b?'(?:[^'\\\n]|\\[^\n]{1,10}?)'`,
    keywords: words(
      "as async await bool break char const continue crate dyn else enum extern f32 f64 false fn for i128 i16 i32 i64 i8 if impl in " +
        "isize let loop match mod move mut pub ref return self Self static str struct super trait true type u128 u16 u32 u64 u8 " +
        "unsafe use usize where while",
    ),
  },
  c: {
    comments: SLASHES,
    strings: STRINGS,
    keywords: words(
      `${C_WORDS} alignas alignof bool catch class concept const_cast constexpr consteval decltype delete dynamic_cast explicit export ` +
        "false final friend mutable namespace new noexcept nullptr operator override private protected public requires " +
        "static_assert static_cast template this throw true try typename using virtual",
    ),
    special: String.raw`#[ \t]*[a-z]+`,
  },
  go: {
    comments: SLASHES,
    strings: `${STRINGS}|${BACKTICKS}`,
    keywords: words(
      "any bool break byte case chan const continue default defer else error fallthrough false float32 float64 for func go goto if " +
        "import int int32 int64 interface map nil package range return rune select string struct switch true type uint uint64 var",
    ),
  },
  java: {
    comments: SLASHES,
    strings: `${TRIPLES}|${STRINGS}`,
    keywords: words(
      "abstract as async await base boolean break by byte case catch char class companion const continue data default delegate do double " +
        "else enum extends false final finally float for foreach fun if implements import in init instanceof int interface internal is " +
        "lateinit long namespace native new null object open operator out override package permits private protected public readonly " +
        "record ref return sealed short static string struct super suspend switch synchronized this throw throws transient true try " +
        "typeof using val var virtual void volatile when while yield",
    ),
    special: String.raw`@[A-Za-z_]\w*`,
  },
  swift: {
    comments: SLASHES,
    strings: `${TRIPLES}|${STRINGS}`,
    keywords: words(
      "actor as associatedtype async await break case catch class continue default defer deinit do else enum extension false fileprivate " +
        "final for func guard if import in init inout internal is lazy let mutating nil open override private protocol public repeat " +
        "rethrows return self Self some static struct subscript super switch throw throws true try typealias var weak where while",
    ),
    special: String.raw`@[A-Za-z_]\w*`,
  },
  ruby: {
    comments: HASHES,
    strings: STRINGS,
    keywords: words(
      "alias and attr_accessor attr_reader begin break case class def do else elsif end ensure extend false for if in include lambda " +
        "module next nil not or private proc protected public puts raise redo require rescue retry return self super then true undef " +
        "unless until when while yield",
    ),
    special: String.raw`:[A-Za-z_]\w*|@{1,2}[A-Za-z_]\w*`,
  },
  shell: {
    comments: HASHES,
    strings: String.raw`"(?:[^"\\]|\\[\s\S])*"?|'[^']*'?`,
    keywords: words(
      "alias break case cd continue do done echo elif else esac eval exec exit export fi for function if in local printf read readonly " +
        "return set shift source sudo test then trap unset until while",
    ),
    special: String.raw`\$(?:\w+|\{[^}\n]*\}?|[@#?*!$])`,
  },
  json: { comments: SLASHES, strings: String.raw`"(?:[^"\\\n]|\\[\s\S])*"?`, keywords: words("true false null") },
  yaml: {
    comments: HASHES,
    strings: STRINGS,
    keywords: words("true false null yes no on off"),
    special: String.raw`[A-Za-z_][\w.-]{0,80}(?=:(?:\s|$))`,
  },
  toml: {
    comments: "[#;][^\\n]*",
    strings: `${TRIPLES}|${STRINGS}`,
    keywords: words("true false"),
    special: String.raw`\[{1,2}[^\]\n]{0,200}\]{1,2}`,
  },
  sql: {
    comments: String.raw`--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`,
    strings: String.raw`'(?:[^']|'')*'?|"[^"\n]*"?`,
    keywords: words(
      "add all alter and as asc between by case check column constraint create cross database default delete desc distinct drop else end " +
        "exists foreign from full group having in index inner insert into is join key left like limit not null offset on or order outer " +
        "over partition primary references returning right select set table then union unique update using values view when where with",
    ),
    anyCase: true,
  },
  css: {
    comments: String.raw`\/\*[\s\S]*?(?:\*\/|$)`,
    strings: STRINGS,
    keywords: words("important inherit initial none auto unset"),
    special: String.raw`@[a-z-]+|--[\w-]+|[a-z-]{1,60}(?=:[ \t])|#[0-9A-Fa-f]{3,8}\b`,
  },
  html: {
    comments: String.raw`<!--[\s\S]*?(?:-->|$)`,
    strings: String.raw`"[^"<]*"?|'[^'<\n]*'(?=[\s>])`,
    keywords: words(""),
    special: String.raw`<[\/!?]?[A-Za-z][\w:-]*|\/?>|&[#\w]{1,30};`,
  },
};

const ALIASES = {
  js: "javascript", jsx: "javascript", ts: "javascript", tsx: "javascript", typescript: "javascript", mjs: "javascript",
  py: "python", python3: "python", rs: "rust", h: "c", cpp: "c", "c++": "c", cc: "c", hpp: "c", cuda: "c", golang: "go",
  kotlin: "java", kt: "java", csharp: "java", cs: "java", "c#": "java", scala: "java", rb: "ruby", sh: "shell", bash: "shell",
  zsh: "shell", console: "shell", dockerfile: "shell", json5: "json", jsonc: "json", jsonl: "json", yml: "yaml", ini: "toml",
  scss: "css", xml: "html", svg: "html", vue: "html",
};

const NUMBER = String.raw`(?:0[xXbBoO][0-9a-fA-F_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?)\w*`;

function expressionOf({ comments, strings, special }) {
  const word = "[A-Za-z_$][\\w$]*";
  const parts = [`(?<comment>${comments})`, `(?<string>${strings})`, special && `(?<special>${special})`, `(?<number>${NUMBER})`, `(?<word>${word})`];
  return new RegExp(parts.filter(Boolean).join("|"), "y");
}

/** The code as text and coloured elements. */
export function highlight(text, name) {
  const wanted = String(name).toLowerCase();
  if (wanted === "diff" || wanted === "patch") return diff(text);
  const chosen = Object.hasOwn(ALIASES, wanted) ? ALIASES[wanted] : wanted;
  if (!Object.hasOwn(LANGUAGES, chosen) || text.length > LONGEST) return [text];
  const language = LANGUAGES[chosen];
  language.expression ??= expressionOf(language);
  return tokens(text, language);
}

function tokens(text, { expression, keywords, anyCase }) {
  const out = [];
  let [plain, at] = ["", 0];
  while (at < text.length) {
    expression.lastIndex = at;
    const found = expression.exec(text);
    if (!found || found[0] === "") {
      plain += text[at++];
      continue;
    }
    const [token] = found;
    at += token.length;
    const kind = kindOf(found.groups, keywords, anyCase, text[at]);
    if (!kind) {
      plain += token;
      continue;
    }
    if (plain) out.push(plain);
    plain = "";
    out.push(coloured(kind, token));
  }
  if (plain) out.push(plain);
  return out;
}

function kindOf(groups, keywords, anyCase, next) {
  if (groups.word === undefined) return Object.keys(groups).find((kind) => groups[kind] !== undefined);
  if (keywords.has(anyCase ? groups.word.toLowerCase() : groups.word)) return "keyword";
  return next === "(" ? "call" : null;
}

function coloured(kind, text) {
  const element = document.createElement("span");
  element.className = `code-${kind}`;
  element.textContent = text;
  return element;
}

function diff(text) {
  return text.split(/(?<=\n)/).map((line) => {
    if (line.startsWith("+")) return coloured("added", line);
    if (line.startsWith("-")) return coloured("removed", line);
    return line.startsWith("@@") ? coloured("special", line) : line;
  });
}
