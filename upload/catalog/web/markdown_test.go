package web

import (
	"reflect"
	"strings"
	"testing"
)

func TestMarkdown(t *testing.T) {
	for text, want := range map[string][]block{
		"":             nil,
		"a\nb\n\nc":    {{Kind: "p", Spans: []span{{Text: "a b"}}}, {Kind: "p", Spans: []span{{Text: "c"}}}},
		"# A\n## B":    {{Kind: "h3", Spans: []span{{Text: "A"}}}, {Kind: "h4", Spans: []span{{Text: "B"}}}},
		"- a\n* b":     {{Kind: "ul", Items: [][]span{{{Text: "a"}}, {{Text: "b"}}}}},
		"1. a\n2) b":   {{Kind: "ol", Items: [][]span{{{Text: "a"}}, {{Text: "b"}}}}},
		"```sh\nx\n y": {{Kind: "pre", Text: "x\n y"}},
		"    x\n    y": {{Kind: "pre", Text: "x\ny"}},
		"`a` **b** *c* [d](https://e/f)": {{Kind: "p", Spans: []span{
			{"code", "a", ""}, {Text: " "}, {"strong", "b", ""}, {Text: " "}, {"em", "c", ""}, {Text: " "}, {"a", "d", "https://e/f"},
		}}},
		"[a](javascript:x) [b](//c) [d](https://u:p@h/)": {{Kind: "p", Spans: []span{
			{Text: "[a](javascript:x)"}, {Text: " "}, {Text: "[b](//c)"}, {Text: " "}, {Text: "[d](https://u:p@h/)"},
		}}},
		"2 * 3 * 4, **": {{Kind: "p", Spans: []span{{Text: "2 * 3 * 4, **"}}}},
	} {
		if got := parseMarkdown(text); !reflect.DeepEqual(got, want) {
			t.Errorf("%q gives %+v, want %+v", text, got, want)
		}
	}
	if n := len(parseMarkdown(strings.Repeat("# a\n", 40000))); n > maxBlocks {
		t.Errorf("%d blocks", n)
	}
}

func FuzzMarkdown(f *testing.F) {
	f.Add("# a\n\n- b\n```\nc\n```\n[d](https://e) **f** `g`")
	f.Fuzz(func(t *testing.T, text string) {
		for _, b := range parseMarkdown(text) {
			spans := b.Spans
			for _, i := range b.Items {
				spans = append(spans, i...)
			}
			for _, s := range spans {
				if s.Kind == "a" && !strings.HasPrefix(s.Link, "https://") && !strings.HasPrefix(s.Link, "http://") {
					t.Fatalf("%q links to %q", text, s.Link)
				}
			}
		}
	})
}
