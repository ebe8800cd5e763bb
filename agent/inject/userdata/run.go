package userdata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/journal"
)

// Step is the journal's name for an instance's user data as a whole; its parts
// are "user-data/NNN kind".
const Step = "user-data"

// Options say how user data is run.
type Options struct {
	Root     string // directory of the root: "/" but for tests
	Dir      string // private directory for scripts: /run/instar
	Instance string // instance-id
	User     string // whose authorized_keys #cloud-config's top-level keys are for; "": root
	Journal  *journal.Journal
	Client   *http.Client // for #include
	Output   io.Writer    // what the scripts print
	// Exec runs a program with the given standard input and returns its
	// failure; nil runs it for real.
	Exec func(ctx context.Context, argv []string, stdin io.Reader) error
	// Report is told each step as one line that holds nothing of the user data.
	Report func(string)
}

// Run runs the user data of an instance, unless the journal says that it was
// begun before. Understanding it and fetching what it includes come before it
// counts as begun. Each part runs though one before it failed; the error names
// all that did.
func Run(ctx context.Context, o Options, data []byte) error {
	switch s := o.Journal.State(o.Instance, Step); s {
	case "":
	case journal.Interrupted:
		o.Report(fmt.Sprintf("user data of instance %s was begun and interrupted; it is not run again", o.Instance))
		return nil
	default:
		o.Report(fmt.Sprintf("user data of instance %s ran before (%s)", o.Instance, s))
		return nil
	}
	parts, err := Parse(data)
	if err != nil {
		return err
	}
	if parts, err = Fetch(ctx, o.Client, parts); err != nil {
		return err
	}
	if err := o.Journal.Begin(o.Instance, Step); err != nil {
		return err
	}
	var errs []error
	n := 0
	for _, kind := range []Kind{CloudConfig, Script} {
		for _, p := range parts {
			if p.Kind != kind {
				continue
			}
			n++
			if err := runPart(ctx, o, n, p); err != nil {
				errs = append(errs, err)
			}
			if ctx.Err() != nil {
				// Left as started: the next opening of the journal says interrupted.
				return errors.Join(errs...)
			}
		}
	}
	err = errors.Join(errs...)
	return errors.Join(err, o.Journal.End(o.Instance, Step, err != nil, fmt.Sprintf("%d parts", n)))
}

func runPart(ctx context.Context, o Options, n int, p Part) error {
	step := fmt.Sprintf("%s/%03d %s", Step, n, p.Kind)
	if err := o.Journal.Begin(o.Instance, step); err != nil {
		return err
	}
	o.Report(fmt.Sprintf("running part %d of the user data (%s)", n, p.Kind))
	var err error
	if p.Kind == CloudConfig {
		err = applyConfig(ctx, o, p.Data)
	} else {
		err = runScript(ctx, o, n, p.Data)
	}
	if ctx.Err() != nil {
		return err
	}
	note := ""
	if err != nil {
		err = fmt.Errorf("part %d of the user data (%s): %w", n, p.Kind, err)
		note = noteOf(err)
	}
	return errors.Join(err, o.Journal.End(o.Instance, step, err != nil, note))
}

// noteOf keeps an exit status, which is no secret, and nothing else.
func noteOf(err error) string {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ProcessState.String()
	}
	return ""
}

func runScript(ctx context.Context, o Options, n int, data []byte) error {
	first, _, _ := bytes.Cut(data, []byte("\n"))
	if bytes.HasSuffix(first, []byte("\r")) {
		return fmt.Errorf("%w: the script's first line ends in CR LF, which no kernel runs; save it with LF line ends", ErrUnsupported)
	}
	dir := filepath.Join(o.Dir, "scripts")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	done, err := allowPrograms(dir)
	if err != nil {
		return err
	}
	defer done()
	name := filepath.Join(dir, fmt.Sprintf("part-%03d", n))
	if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.WriteFile(name, data, 0o700); err != nil {
		return err
	}
	defer os.Remove(name)
	return o.run(ctx, []string{name}, nil)
}

// allowPrograms makes dir a place that programs may be started from: Debian's
// initrd mounts /run without. A tmpfs over dir is gone again after done.
func allowPrograms(dir string) (done func(), err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if st.Flags&unix.ST_NOEXEC == 0 {
		return func() {}, nil
	}
	if err := unix.Mount("instar", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=16m"); err != nil {
		return nil, fmt.Errorf("%s is mounted noexec, and no tmpfs can be mounted over it: %w", dir, err)
	}
	// A script that left something running keeps it until that ends.
	return func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }, nil
}

func (o Options) loginUser() string {
	if o.User == "" {
		return "root"
	}
	return o.User
}

func (o Options) run(ctx context.Context, argv []string, stdin io.Reader) error {
	if o.Exec != nil {
		return o.Exec(ctx, argv, stdin)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh", "LANG=C.UTF-8",
		"INSTANCE_ID=" + o.Instance,
	}
	cmd.Stdin = stdin
	cmd.Stdout, cmd.Stderr = o.Output, o.Output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(strings.TrimSpace(argv[0])), err)
	}
	return nil
}
