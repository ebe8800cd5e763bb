package userdata

import (
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/journal"
)

// newOptions is a root directory with a journal; what is executed is recorded.
func newOptions(t *testing.T) (Options, *[]string) {
	root := t.TempDir()
	for _, d := range []string{"etc", "run", "usr/bin", "usr/share/zoneinfo/Europe", "var/lib/instar"} {
		must(t, os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(root, "usr/bin/apt-get"), nil, 0o755))
	must(t, os.WriteFile(filepath.Join(root, "usr/share/zoneinfo/Europe/Rome"), nil, 0o644))
	must(t, os.Mkdir(filepath.Join(root, "root"), 0o700))
	d, err := os.Open(filepath.Join(root, "var/lib/instar"))
	must(t, err)
	defer d.Close()
	j, err := journal.Open(d)
	must(t, err)
	t.Cleanup(func() { j.Close() })
	var ran []string
	return Options{
		Root: root, Dir: filepath.Join(root, "run"), Instance: "i-1", Journal: j, Output: io.Discard,
		Client: &http.Client{Transport: replies{}},
		Exec: func(_ context.Context, argv []string, stdin io.Reader) error {
			line := strings.Join(argv, " ")
			if stdin != nil {
				in, _ := io.ReadAll(stdin)
				line += " <<" + string(in)
			}
			ran = append(ran, strings.ReplaceAll(line, root, ""))
			return nil
		},
		Report: func(string) {},
	}, &ran
}

func TestScripts(t *testing.T) {
	o, _ := newOptions(t)
	o.Exec = nil
	var out bytes.Buffer
	o.Output = &out
	err := Run(t.Context(), o, []byte(mimeOf(
		"Content-Type: text/x-shellscript", "#!/bin/sh\necho one $INSTANCE_ID $0 | sed 's|/tmp.*|path|'\nexit 3\n",
		"Content-Type: text/x-shellscript", "#!/bin/sh\necho two\n",
		"Content-Type: text/x-shellscript\nContent-Transfer-Encoding: base64", base64.StdEncoding.EncodeToString([]byte("#!/bin/sh\r\ntrue\r\n")),
		"Content-Type: text/cloud-config", "runcmd: [ 'echo config' ]",
	)))
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "CR LF") {
		t.Errorf("error %v", err)
	}
	if got := out.String(); got != "config\none i-1 path\ntwo\n" {
		t.Errorf("output %q", got)
	}
	if left, _ := filepath.Glob(filepath.Join(o.Dir, "scripts", "*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestScriptsWhereRunIsNoexec is a /run as Debian's initrd mounts it.
func TestScriptsWhereRunIsNoexec(t *testing.T) {
	o, _ := newOptions(t)
	o.Exec = nil
	var out bytes.Buffer
	o.Output = &out
	must(t, unix.Mount("tmpfs", o.Dir, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID, "size=1m"))
	t.Cleanup(func() { unix.Unmount(o.Dir, unix.MNT_DETACH) })
	must(t, Run(t.Context(), o, []byte(mimeOf("Content-Type: text/x-shellscript", "#!/bin/sh\necho one\n", "Content-Type: text/x-shellscript", "#!/bin/sh\necho two\n"))))
	if got := out.String(); got != "one\ntwo\n" {
		t.Errorf("output %q", got)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	if strings.Contains(string(mounts), filepath.Join(o.Dir, "scripts")) {
		t.Error("a mount is left behind")
	}
}

// TestAtMostOnce kills the run before and after each thing it executes, and
// after each record of the journal, and starts it again: no part ever runs
// twice, and what was cut short is told.
func TestAtMostOnce(t *testing.T) {
	data := []byte(mimeOf(
		"Content-Type: text/cloud-config", "runcmd: [ a ]",
		"Content-Type: text/x-shellscript", script, "Content-Type: text/x-shellscript", script))
	type killed struct{}
	for point := 0; ; point++ {
		o, _ := newOptions(t)
		counts := make(map[string]int)
		at := 0
		tick := func() {
			if at++; at == point {
				panic(killed{})
			}
		}
		armed := true
		o.Exec = func(_ context.Context, argv []string, _ io.Reader) error {
			if armed {
				tick()
			}
			counts[strings.Join(argv, " ")]++
			if armed {
				tick()
			}
			return nil
		}
		o.Report = func(string) {
			if armed {
				tick()
			}
		}
		died := func() (died bool) {
			defer func() {
				if r := recover(); r != nil {
					if _, ok := r.(killed); !ok {
						panic(r)
					}
					died = true
				}
			}()
			must(t, Run(t.Context(), o, data))
			return false
		}()
		armed = false
		// The next boot.
		must(t, o.Journal.Close())
		d, err := os.Open(filepath.Join(o.Root, "var/lib/instar"))
		must(t, err)
		o.Journal, err = journal.Open(d)
		must(t, err)
		d.Close()
		var said []string
		o.Report = func(s string) { said = append(said, s) }
		must(t, Run(t.Context(), o, data))
		for what, n := range counts {
			if n > 1 {
				t.Errorf("killed at %d: %s ran %d times", point, what, n)
			}
		}
		if died && (o.Journal.State("i-1", Step) != journal.Interrupted || !strings.Contains(strings.Join(said, ""), "interrupted")) {
			t.Errorf("killed at %d: journal says %q, report %q", point, o.Journal.State("i-1", Step), said)
		}
		if !died && point > 0 {
			if len(counts) != 3 {
				t.Errorf("only %v ran", counts)
			}
			if point < 8 {
				t.Errorf("only %d points", point)
			}
			return
		}
	}
}

// TestIncludeFailureIsNotARun: what could not be fetched is tried at the next boot.
func TestIncludeFailureIsNotARun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, ran := newOptions(t)
		data := []byte("#include\nhttp://h/a\n")
		if err := Run(t.Context(), o, data); err == nil {
			t.Fatal("no error")
		}
		if s := o.Journal.State("i-1", Step); s != "" {
			t.Errorf("journal says %q", s)
		}
		o.Client.Transport = replies{"http://h/a": reply(200, script)}
		must(t, Run(t.Context(), o, data))
		if len(*ran) != 1 {
			t.Errorf("ran %q", *ran)
		}
	})
}
