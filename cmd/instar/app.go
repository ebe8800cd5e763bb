package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/config"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// family says whose conventions hold where the peers differ.
type family uint8

const (
	familyInstar family = iota // ec2-ami-tools', with the better choice where theirs does harm
	familyEC2
	familyEuca
)

// app is one run of the program: the world outside, the options every command
// has, and what came of them.
type app struct {
	tool   string // as called: "ec2-bundle-vol", "instar"
	args   []string
	family family
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer
	getenv func(string) string

	json, quiet, debug, batch bool
	manual, showVersion       bool
	configFile                string
	region                    string // --region, which some commands have

	ui   *ui.Printer
	conf *config.Config

	// For a capture that a worker of the agent makes: nil otherwise.
	onProgress  func(label string, total int64)
	snapshotted func() // the volume is read from a snapshot from now on
}

func newApp(args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) *app {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, getenv: getenv, tool: "instar", args: args}
	if len(args) > 0 {
		a.tool = filepath.Base(args[0])
	}
	a.newUI() // until the options are known
	return a
}

func (a *app) newUI() {
	a.ui = ui.New(ui.Options{
		Stdout: a.stdout, Stderr: a.stderr, Tool: a.tool, JSON: a.json, Quiet: a.quiet, Debug: a.debug,
		NoColor: a.getenv("NO_COLOR") != "" || a.getenv("TERM") == "dumb", Journal: a.getenv("JOURNAL_STREAM"),
		OnProgress: a.onProgress,
	})
}

// run finds the command, runs it, says what went wrong and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := newRoot(a)
	var rest []string
	if len(args) > 0 {
		rest = args[1:]
	}
	command, fam := dispatch(root, a.tool)
	a.family = fam
	if command != "" {
		rest = append([]string{command}, rest...)
	}
	if cmd, _, err := root.Find(rest); err == nil {
		rest = expand(cmd, rest)
	}
	root.SetArgs(rest)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if ctx.Err() != nil && err != nil && !errors.Is(err, context.Canceled) {
		err = fmt.Errorf("%w: %w", context.Canceled, err)
	}
	code := exitCode(err)
	if code == exitOK {
		return code
	}
	if slices.Contains(rest, "--json") { // the command line may have failed before it was read
		a.json = true
	}
	a.newUI()
	a.report(cmd, err, code)
	return code
}

// report prints one line for an error, and hints after it.
func (a *app) report(cmd *cobra.Command, err error, code int) {
	hint := ""
	var e *exitError
	if errors.As(err, &e) {
		hint = e.hint
	}
	if code == exitInterrupt {
		err = errors.New("interrupted")
	}
	if errors.Is(err, errUsage) {
		err = errors.New(strings.TrimPrefix(err.Error(), errUsage.Error()+": "))
		try := a.tool
		if a.family == familyInstar && cmd != nil && cmd.HasParent() {
			try += strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name())
		}
		if hint == "" {
			hint = fmt.Sprintf("Try '%s --help'.", try)
		}
	}
	if code == exitChanged {
		a.ui.Warn(err.Error(), ui.Fields{"code": code})
		return
	}
	a.ui.Error(err, code, hint)
}

// begin runs before every command: it settles how to speak and what is configured.
func (a *app) begin(cmd *cobra.Command) error {
	if a.batch || a.json {
		a.batch = true
	}
	a.newUI()
	for _, name := range []string{"secret-key", "delegation-token", "enc-key", "enc-iv"} {
		if f := cmd.Flags().Lookup(name); f != nil {
			hideSecrets(f.Value.String())
		}
	}
	switch {
	case a.manual:
		if err := showManual(a.stdout, cmd); err != nil {
			return err
		}
		return errShown
	case a.showVersion:
		fmt.Fprintln(a.stdout, versionLine(a.family))
		return errShown
	}
	conf, err := config.Load(config.Sources{
		Getenv: a.getenv, Home: a.getenv("HOME"), Etc: a.etc(), User: a.userConfig(),
		Euca: a.family == familyEuca, Region: a.region,
	})
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	a.conf = conf
	return nil
}

// etc is the directory of the machine's configuration.
func (a *app) etc() string {
	if d := a.getenv("INSTAR_ETC"); d != "" {
		return d
	}
	return "/etc/instar"
}

func (a *app) userConfig() string {
	if a.configFile != "" {
		return a.configFile
	}
	return a.getenv("INSTAR_CONFIG")
}

// tempDir is where scratch files go.
func (a *app) tempDir() string {
	for _, n := range []string{"TMPDIR", "TEMP", "TMP"} {
		if d := a.getenv(n); d != "" {
			return d
		}
	}
	return "/var/tmp"
}

// command makes a command without positional arguments.
func (a *app) command(name, short, long, example string, run func(ctx context.Context) error) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short, Long: strings.TrimSpace(long), Example: strings.Trim(example, "\n"),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     cobra.NoFileCompletions,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && !a.manual && !a.showVersion {
				return usagef("unexpected argument %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context()) },
	}
}

// need refuses a command line without an option that has no default.
func need(value, option string) error {
	if value == "" {
		return usagef("missing option %s", option)
	}
	return nil
}

// isFile checks that an option names a file that can be opened.
func isFile(path, what string) error {
	st, err := os.Stat(path)
	if err != nil {
		return failf(exitFile, "%s: %w", what, err)
	}
	if st.IsDir() {
		return failf(exitFile, "%s: %s is a directory", what, path)
	}
	return nil
}

// isDir checks that an option names a directory.
func isDir(path, what string) error {
	st, err := os.Stat(path)
	if err != nil {
		return failf(exitFile, "%s: %w", what, err)
	}
	if !st.IsDir() {
		return failf(exitFile, "%s: %s is not a directory", what, path)
	}
	return nil
}
