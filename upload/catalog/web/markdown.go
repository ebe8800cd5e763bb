package web

import (
	"net/url"
	"regexp"
	"strings"
	"unicode/utf8"
)

// A getting-started page is plain text with a little Markdown: headings (#, ##,
// ###), paragraphs, lists (-, *, 1.), code between ``` or `, **strong**, *em*,
// and links [text](https://…). It becomes a tree that the templates write out,
// so that whatever it holds stays text; there is no way to HTML.

// block is a paragraph, heading, list or piece of code.
type block struct {
	Kind  string // "p", "h3", "h4", "h5", "ul", "ol", "pre"
	Spans []span
	Items [][]span
	Text  string // of code
}

// span is a run of text within a line.
type span struct {
	Kind string // "", "code", "strong", "em", "a"
	Text string
	Link string // of "a": http, https or mailto
}

// limits of a page.
const (
	maxPage   = 64 << 10 // bytes
	maxBlocks = 2000
)

var (
	numbered = regexp.MustCompile(`^[0-9]{1,9}[.)] `)
	spanMark = regexp.MustCompile("`[^`\n]+`|\\*\\*[^*\n]+\\*\\*|\\*[^*\\s][^*\n]*\\*|\\[[^\\[\\]\n]+\\]\\([^()\\s]+\\)")
)

// parseMarkdown reads a page. Every text gives one; what is not of the subset
// is shown as it stands.
func parseMarkdown(text string) []block {
	if len(text) > maxPage {
		text = strings.ToValidUTF8(text[:maxPage], "") + "\n…"
	}
	if !utf8.ValidString(text) {
		text = strings.ToValidUTF8(text, "�")
	}
	var out []block
	var paragraph []string
	flush := func() {
		if len(paragraph) > 0 {
			out = append(out, block{Kind: "p", Spans: parseSpans(strings.Join(paragraph, " "))})
			paragraph = nil
		}
	}
	lines := strings.Split(strings.ReplaceAll(text, "\r\n", "\n"), "\n")
	for i := 0; i < len(lines) && len(out) < maxBlocks; i++ {
		line := strings.TrimRight(lines[i], " \t")
		trimmed := strings.TrimLeft(line, " ")
		kind, rest := lineKind(trimmed)
		switch {
		case line == "":
			flush()
		case kind == "fence":
			flush()
			var code []string
			for i++; i < len(lines) && !strings.HasPrefix(strings.TrimLeft(lines[i], " "), "```"); i++ {
				code = append(code, lines[i])
			}
			out = append(out, block{Kind: "pre", Text: strings.Join(code, "\n")})
		case strings.HasPrefix(line, "    ") && len(paragraph) == 0:
			last := len(out) - 1
			if last >= 0 && out[last].Kind == "pre" && i > 0 && lines[i-1] != "" {
				out[last].Text += "\n" + line[4:]
			} else {
				out = append(out, block{Kind: "pre", Text: line[4:]})
			}
		case kind == "ul" || kind == "ol":
			flush()
			last := len(out) - 1
			if last < 0 || out[last].Kind != kind || i > 0 && lines[i-1] == "" {
				out = append(out, block{Kind: kind})
				last++
			}
			out[last].Items = append(out[last].Items, parseSpans(rest))
		case kind != "":
			flush()
			out = append(out, block{Kind: kind, Spans: parseSpans(rest)})
		default:
			paragraph = append(paragraph, trimmed)
		}
	}
	flush()
	return out
}

// lineKind says what a line begins, and what is behind its mark. The page's own
// headings are h1 and h2.
func lineKind(s string) (kind, rest string) {
	for _, m := range []struct{ mark, kind string }{{"# ", "h3"}, {"## ", "h4"}, {"### ", "h5"}, {"- ", "ul"}, {"* ", "ul"}} {
		if rest, ok := strings.CutPrefix(s, m.mark); ok {
			return m.kind, strings.TrimSpace(rest)
		}
	}
	if strings.HasPrefix(s, "```") {
		return "fence", ""
	}
	if m := numbered.FindString(s); m != "" {
		return "ol", s[len(m):]
	}
	return "", s
}

func parseSpans(s string) []span {
	var out []span
	add := func(p span) {
		if p.Text != "" {
			out = append(out, p)
		}
	}
	for s != "" {
		at := spanMark.FindStringIndex(s)
		if at == nil {
			break
		}
		add(span{Text: s[:at[0]]})
		add(oneSpan(s[at[0]:at[1]]))
		s = s[at[1]:]
	}
	add(span{Text: s})
	return out
}

func oneSpan(m string) span {
	switch {
	case m[0] == '`':
		return span{Kind: "code", Text: m[1 : len(m)-1]}
	case strings.HasPrefix(m, "**"):
		return span{Kind: "strong", Text: m[2 : len(m)-2]}
	case m[0] == '*':
		return span{Kind: "em", Text: m[1 : len(m)-1]}
	}
	text, link, _ := strings.Cut(m[1:len(m)-1], "](")
	if u, err := url.Parse(link); err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != "" && u.User == nil {
		return span{Kind: "a", Text: text, Link: u.String()}
	}
	return span{Text: m}
}
