// Package optdoc writes docs/options.md, the table of every option of the
// peers and what became of it. Rows go in, Markdown comes out.
package optdoc

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// Row is one option of one of the peers' tools.
type Row struct {
	Tool    string   // "ec2-bundle-vol"
	Option  string   // "-s, --size"; "" for the tool itself
	Refused string   // reason and substitute; "" when it works
	Tests   []string // names of the tests that show the effect
}

// Write writes the page; tools keep the order of their first row.
func Write(w io.Writer, rows []Row) error {
	var b strings.Builder
	b.WriteString(`# The peers' commands and options

Every command and option of ec2-ami-tools 1.5.3 and euca2ools 3.4.1, and what it
does in Instar. *works* means with its effect, shown by the test that is named;
*refused* means that the option is known and answered with the reason and what
to do instead. Made by ` + "`instar options-table`" + `; a test keeps it current and complete.

Any command can be called as ` + "`instar NAME`" + ` or through a link with the peer's name
(` + "`instar links DIR`" + `). Options of both families are accepted under either name.

`)
	works, refused := 0, 0
	for _, r := range rows {
		if r.Option == "" {
			continue
		}
		if r.Refused == "" {
			works++
		} else {
			refused++
		}
	}
	fmt.Fprintf(&b, "%d options work, %d are refused by name.\n", works, refused)
	var tools []string
	for _, r := range rows {
		if !slices.Contains(tools, r.Tool) {
			tools = append(tools, r.Tool)
		}
	}
	for _, t := range tools {
		fmt.Fprintf(&b, "\n## %s\n\n", t)
		head := false
		for _, r := range rows {
			if r.Tool != t {
				continue
			}
			if r.Option == "" {
				fmt.Fprintf(&b, "Refused: %s.\n\n", r.Refused)
				continue
			}
			if !head {
				b.WriteString("| option | | test |\n|---|---|---|\n")
				head = true
			}
			state := "works"
			if r.Refused != "" {
				state = "refused: " + r.Refused
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.Option, strings.ReplaceAll(state, "|", `\|`), strings.Join(r.Tests, ", "))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
