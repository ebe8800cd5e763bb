package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// origin says whose option a flag is. The rows of docs/options.md are made
// from it, so an option cannot be accepted without being listed.
type origin uint8

const (
	ofEC2  origin = 1 << iota // ec2-ami-tools
	ofEuca                    // euca2ools
	ofBoth        = ofEC2 | ofEuca
	ofUs   origin = 0
)

// Annotations of a flag from which docs/options.md is generated.
const (
	noteOrigin  = "instar_origin"  // "ec2", "euca"
	noteTest    = "instar_test"    // the script or test that shows the option's effect
	noteRefused = "instar_refused" // why it is refused, and the substitute
	noteExits   = "instar_exits"   // of a command: its exit codes beyond the common ones
)

// flags adds options to one command.
type flags struct {
	*pflag.FlagSet
}

func flagsOf(cmd *cobra.Command) flags {
	cmd.Flags().SortFlags = false
	return flags{cmd.Flags()}
}

// opt is an option that has just been added.
type opt struct {
	fs   *pflag.FlagSet
	flag *pflag.Flag
}

// add adds one option. The usage names the argument in backquotes; test is
// the name of the test that shows the option's effect.
func (f flags) add(v pflag.Value, name, short, usage string, of origin, test string) opt {
	fl := f.VarPF(v, name, short, usage)
	fl.Annotations = map[string][]string{noteTest: {test}}
	if of&ofEC2 != 0 {
		fl.Annotations[noteOrigin] = append(fl.Annotations[noteOrigin], "ec2")
	}
	if of&ofEuca != 0 {
		fl.Annotations[noteOrigin] = append(fl.Annotations[noteOrigin], "euca")
	}
	if b, ok := v.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
		fl.NoOptDefVal = "true"
	}
	return opt{f.FlagSet, fl}
}

// also adds a further spelling of the same option, listed in docs/options.md
// but not in help. name may be "" for a short option alone.
func (o opt) also(name, short string, of origin) opt {
	if name == "" {
		name = o.flag.Name + "-" + short
	}
	fl := o.fs.VarPF(o.flag.Value, name, short, o.flag.Usage+" (the same as --"+o.flag.Name+")")
	fl.NoOptDefVal, fl.Hidden = o.flag.NoOptDefVal, true
	fl.Annotations = map[string][]string{noteTest: o.flag.Annotations[noteTest]}
	if of&ofEC2 != 0 {
		fl.Annotations[noteOrigin] = append(fl.Annotations[noteOrigin], "ec2")
	}
	if of&ofEuca != 0 {
		fl.Annotations[noteOrigin] = append(fl.Annotations[noteOrigin], "euca")
	}
	return o
}

// hidden keeps the option out of help: the peers hide it too.
func (o opt) hidden() opt {
	o.flag.Hidden = true
	return o
}

// refuse adds an option that is known and refused: why ends with what to do
// instead.
func (f flags) refuse(name, short, why string, of origin, takesValue bool) {
	fl := f.add(&refused{name: name, why: why, flag: !takesValue}, name, short, "refused: "+why, of, "TestRefused")
	fl.flag.Hidden = true
	fl.flag.Annotations[noteRefused] = []string{why}
}

// errRefused marks what the peers know and Instar refuses by name.
var errRefused = errors.New("refused")

// refused is the value of an option that is refused by name.
type refused struct {
	name, why string
	flag      bool
}

func (r *refused) String() string   { return "" }
func (r *refused) Type() string     { return "value" }
func (r *refused) IsBoolFlag() bool { return r.flag }
func (r *refused) Set(string) error {
	return fmt.Errorf("option --%s is %w: %s", r.name, errRefused, r.why)
}

// text is a string option.
type text string

func (v *text) String() string     { return string(*v) }
func (v *text) Set(s string) error { *v = text(s); return nil }
func (v *text) Type() string       { return "string" }

func (f flags) text(p *string, name, short, usage string, of origin, test string) opt {
	return f.add((*text)(p), name, short, usage, of, test)
}

// yes is a switch.
type yes bool

func (v *yes) String() string   { return strconv.FormatBool(bool(*v)) }
func (v *yes) Type() string     { return "bool" }
func (v *yes) IsBoolFlag() bool { return true }
func (v *yes) Set(s string) error {
	b, err := strconv.ParseBool(s)
	*v = yes(b)
	return err
}

func (f flags) yes(p *bool, name, short, usage string, of origin, test string) opt {
	return f.add((*yes)(p), name, short, usage, of, test)
}

// list is an option that may be given several times and whose argument may
// hold several values between commas.
type list []string

func (v *list) String() string { return strings.Join(*v, ",") }
func (v *list) Type() string   { return "list" }
func (v *list) Set(s string) error {
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			*v = append(*v, part)
		}
	}
	return nil
}

func (f flags) list(p *[]string, name, short, usage string, of origin, test string) opt {
	return f.add((*list)(p), name, short, usage, of, test)
}

// lines is an option that may be given several times, each time with one value
// that may hold anything.
type lines []string

func (v *lines) String() string     { return strings.Join(*v, " ") }
func (v *lines) Type() string       { return "list" }
func (v *lines) Set(s string) error { *v = append(*v, s); return nil }

// choice is an option with a fixed set of arguments.
type choice struct {
	p    *string
	from []string
}

func (v choice) String() string {
	if v.p == nil {
		return ""
	}
	return *v.p
}
func (v choice) Type() string { return "string" }
func (v choice) Set(s string) error {
	for _, c := range v.from {
		if s == c {
			*v.p = s
			return nil
		}
	}
	return fmt.Errorf("must be one of %s", strings.Join(v.from, ", "))
}

func (f flags) choice(cmd *cobra.Command, p *string, from []string, name, short, usage string, of origin, test string) opt {
	o := f.add(choice{p, from}, name, short, usage, of, test)
	complete(cmd, name, from...)
	return o
}

// number is a whole number of at least 0.
type number int

func (v *number) String() string { return strconv.Itoa(int(*v)) }
func (v *number) Type() string   { return "int" }
func (v *number) Set(s string) error {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return errors.New("must be a whole number of at least 0")
	}
	*v = number(n)
	return nil
}

func (f flags) number(p *int, name, short, usage string, of origin, test string) opt {
	return f.add((*number)(p), name, short, usage, of, test)
}

// size is a number of bytes with an optional suffix k, m, g or t (powers of
// 1024), in either case and with an optional "b" or "ib" behind.
type size int64

func (v *size) String() string {
	if *v == 0 {
		return ""
	}
	return strconv.FormatInt(int64(*v), 10)
}
func (v *size) Type() string { return "size" }
func (v *size) Set(s string) error {
	n, err := parseSize(s)
	*v = size(n)
	return err
}

func (f flags) size(p *int64, name, short, usage string, of origin, test string) opt {
	return f.add((*size)(p), name, short, usage, of, test)
}

func parseSize(s string) (int64, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	if len(t) > 1 {
		t = strings.TrimSuffix(strings.TrimSuffix(t, "b"), "i")
	}
	shift := 0
	if n := len(t); n > 0 {
		if i := strings.IndexByte("kmgt", t[n-1]); i >= 0 {
			shift, t = 10*(i+1), t[:n-1]
		}
	}
	n, err := strconv.ParseInt(t, 10, 64)
	if err != nil || n <= 0 || n > (1<<62)>>shift {
		return 0, fmt.Errorf("%q is no size: give a positive number of bytes, or one with k, m, g or t behind it", s)
	}
	return n << shift, nil
}

// mappings is a list of virtual=device pairs, kept in order.
type mappings []mapping

type mapping struct{ virtual, device string }

func (v *mappings) String() string { return "" }
func (v *mappings) Type() string   { return "mappings" }
func (v *mappings) Set(s string) error {
	for part := range strings.SplitSeq(s, ",") {
		virtual, device, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok || virtual == "" || device == "" {
			return fmt.Errorf("%q is no mapping: write virtual=device, as in ami=sda1,root=/dev/sda1", part)
		}
		*v = append(*v, mapping{virtual, device})
	}
	return nil
}

// complete offers values for an option to the shell.
func complete(cmd *cobra.Command, name string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return values, cobra.ShellCompDirectiveNoFileComp
	})
	if err != nil {
		panic("instar: internal error: completion for an option that does not exist: " + name)
	}
}

// completeFiles says that an option takes a file with one of these endings,
// or a directory if none is given.
func completeFiles(cmd *cobra.Command, name string, ext ...string) {
	var err error
	if len(ext) == 0 {
		err = cmd.MarkFlagDirname(name)
	} else {
		err = cmd.MarkFlagFilename(name, ext...)
	}
	if err != nil {
		panic("instar: internal error: completion for an option that does not exist: " + name)
	}
}
