// Package manual writes the manual page of a command, for man(1) and as plain
// text. A [Page] goes in, text comes out; the package touches nothing else.
package manual

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

// Item is a term and its explanation.
type Item struct{ Term, Text string }

// Page is what a manual page says.
type Page struct {
	Name, Usage, Short, Long, Example, Version string
	Commands                                   []Item
	Options, Common                            *pflag.FlagSet
	Exits, Environment, Files                  []Item
}

// sections yields the page's parts in order: a heading, running text, items,
// or text to be shown as it stands.
func (p Page) sections(f func(head, text string, items []Item, verbatim string)) {
	f("NAME", p.Name+" - "+p.Short, nil, "")
	f("SYNOPSIS", p.Usage, nil, "")
	f("DESCRIPTION", p.Long, nil, "")
	f("COMMANDS", "", p.Commands, "")
	f("OPTIONS", "", options(p.Options), "")
	f("COMMON OPTIONS", "", options(p.Common), "")
	f("EXAMPLES", "", nil, p.Example)
	f("EXIT STATUS", "", p.Exits, "")
	f("ENVIRONMENT", "", p.Environment, "")
	f("FILES", "", p.Files, "")
}

func options(fs *pflag.FlagSet) []Item {
	if fs == nil {
		return nil
	}
	var items []Item
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		arg, text := pflag.UnquoteUsage(f)
		term := "--" + f.Name
		if f.Shorthand != "" {
			term = "-" + f.Shorthand + ", " + term
		}
		if arg != "" && f.NoOptDefVal == "" {
			term += " " + arg
		}
		items = append(items, Item{term, text})
	})
	return items
}

// Text is the page for a terminal, lines of at most 80 columns.
func (p Page) Text() string {
	var b strings.Builder
	p.sections(func(head, text string, items []Item, verbatim string) {
		if text == "" && len(items) == 0 && verbatim == "" {
			return
		}
		fmt.Fprintf(&b, "%s\n", head)
		for _, par := range paragraphs(text) {
			if strings.HasPrefix(par, " ") {
				b.WriteString(indent(par, "    ") + "\n\n")
				continue
			}
			b.WriteString(wrap(par, "    ", 80) + "\n\n")
		}
		for _, it := range items {
			fmt.Fprintf(&b, "    %s\n%s\n", it.Term, wrap(it.Text, "        ", 80))
		}
		if len(items) > 0 {
			b.WriteByte('\n')
		}
		if verbatim != "" {
			b.WriteString(indent(verbatim, "    ") + "\n\n")
		}
	})
	return strings.TrimSuffix(b.String(), "\n")
}

// Roff is the page in the man(7) macros.
func (p Page) Roff() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %s 1 \"\" %s \"Instar\"\n", quote(strings.ToUpper(p.Name)), quote("instar "+p.Version))
	p.sections(func(head, text string, items []Item, verbatim string) {
		if text == "" && len(items) == 0 && verbatim == "" {
			return
		}
		fmt.Fprintf(&b, ".SH %s\n", head)
		for i, par := range paragraphs(text) {
			if i > 0 {
				b.WriteString(".PP\n")
			}
			if strings.HasPrefix(par, " ") {
				fmt.Fprintf(&b, ".nf\n%s\n.fi\n", escape(par))
				continue
			}
			b.WriteString(escape(par) + "\n")
		}
		for _, it := range items {
			fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", escape(it.Term), escape(it.Text))
		}
		if verbatim != "" {
			fmt.Fprintf(&b, ".nf\n%s\n.fi\n", escape(verbatim))
		}
	})
	return []byte(b.String())
}

// paragraphs splits at empty lines; a paragraph that begins with a space is
// kept as it stands.
func paragraphs(s string) []string {
	var out []string
	for par := range strings.SplitSeq(s, "\n\n") {
		if par = strings.Trim(par, "\n"); par != "" {
			out = append(out, par)
		}
	}
	return out
}

func wrap(s, margin string, width int) string {
	var b strings.Builder
	col := 0
	for i, w := range strings.Fields(s) {
		switch {
		case i == 0:
			b.WriteString(margin)
			col = len(margin)
		case col+1+len(w) > width:
			b.WriteString("\n" + margin)
			col = len(margin)
		default:
			b.WriteByte(' ')
			col++
		}
		b.WriteString(w)
		col += len(w)
	}
	return b.String()
}

func indent(s, margin string) string {
	return margin + strings.ReplaceAll(s, "\n", "\n"+margin)
}

func quote(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// escape keeps roff from reading text as requests.
func escape(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}
