package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/instar-image/instar/cmd/instar/internal/optdoc"
)

// peerTools are the tools of both families with the command that does their work.
func peerTools() []struct{ tool, command, family string } {
	var out []struct{ tool, command, family string }
	for _, n := range peerNames() {
		fam, cmd, _ := strings.Cut(n, "-")
		switch {
		case n == "ec2-ami-tools-version":
			cmd = "version"
		case fam == "euimage":
			fam, cmd = "euca", n
		}
		out = append(out, struct{ tool, command, family string }{n, cmd, fam})
	}
	return out
}

// optionRows is the table of docs/options.md, from the flags themselves.
func optionRows(root *cobra.Command) []optdoc.Row {
	var rows []optdoc.Row
	for _, t := range peerTools() {
		if r := slices.IndexFunc(refusals(), func(r refusal) bool { return r.name == t.command }); r >= 0 {
			ref := refusals()[r]
			rows = append(rows, optdoc.Row{Tool: t.tool, Refused: ref.why})
			for _, o := range ref.options {
				rows = append(rows, optdoc.Row{Tool: t.tool, Option: strings.ReplaceAll(o, " ", ", "), Refused: "with the command", Tests: []string{"TestRefused"}})
			}
			continue
		}
		cmd, _, err := root.Find([]string{t.command})
		if err != nil {
			continue
		}
		var own []optdoc.Row
		row := func(f *pflag.Flag) {
			if !slices.Contains(f.Annotations[noteOrigin], t.family) {
				return
			}
			name := "--" + f.Name
			switch {
			case f.Shorthand != "" && strings.HasSuffix(f.Name, "-"+f.Shorthand):
				name = "-" + f.Shorthand
			case f.Shorthand != "":
				name = "-" + f.Shorthand + ", --" + f.Name
			}
			r := optdoc.Row{Tool: t.tool, Option: name, Tests: f.Annotations[noteTest]}
			if why := f.Annotations[noteRefused]; why != nil {
				r.Refused = why[0]
			}
			own = append(own, r)
		}
		cmd.LocalNonPersistentFlags().VisitAll(row)
		root.PersistentFlags().VisitAll(row)
		own = append(own, optdoc.Row{Tool: t.tool, Option: "-h, --help", Tests: []string{"common"}})
		rows = append(rows, own...)
	}
	return rows
}
