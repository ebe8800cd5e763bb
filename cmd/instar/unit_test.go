package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/metadata/imds"
	"github.com/instar-image/instar/upload"
)

func TestExitCodes(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("doing something: %w", err) }
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errShown, 0},
		{usagef("x"), 1},
		{&ec2.Error{Class: ec2.ErrKey}, 1},
		{&ec2.Error{Class: ec2.ErrFormat}, 1},
		{keys.ErrPassphrase, 1},
		{rootfs.ErrNoMatch, 1},
		{&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, 1},
		{fs.ErrNotExist, 2},
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, 2},
		{fs.ErrExist, 2},
		{&upload.Error{Kind: upload.ErrAccess}, 3},
		{&upload.Error{Kind: upload.ErrNotExist, Err: fs.ErrNotExist}, 3},
		{&upload.DeleteError{Failed: []*upload.Error{{Kind: upload.ErrLocked}}}, 3},
		{&ec2.Error{Class: ec2.ErrSignature}, 4},
		{&ec2.Error{Class: ec2.ErrUnsigned}, 4},
		{&ec2.Error{Class: ec2.ErrDigest}, 4},
		{&chunked.Error{Class: chunked.ErrCorrupt}, 4},
		{&chunked.Error{Class: chunked.ErrFormat}, 4},
		{&chunked.Error{Class: chunked.ErrVersion}, 4},
		{chunked.CheckImageName("a b"), 1},
		{keys.ErrUntrusted, 4},
		{keys.ErrWrapped, 4},
		{keys.ErrNoIdentity, 1},
		{errSilence, 5},
		{&upload.Error{Kind: upload.ErrBucketElsewhere}, 10},
		{imds.ErrUnreachable, 12},
		{failf(exitChanged, "x"), 24},
		{errors.New("nobody knows this one"), 254},
		{context.Canceled, 255},
		{fmt.Errorf("%w: %w", context.Canceled, &upload.Error{Kind: upload.ErrAccess}), 255},
	} {
		for _, err := range []error{c.err, wrap(c.err)} {
			if c.err == nil {
				err = nil
			}
			if got := exitCode(err); got != c.want {
				t.Errorf("exitCode(%v) = %d, want %d", err, got, c.want)
			}
		}
		if !slices.ContainsFunc(exitTable(), func(e struct {
			code int
			what string
		},
		) bool {
			return e.code == c.want
		}) {
			t.Errorf("exit status %d is not in the manual", c.want)
		}
	}
}

// never is an input that says nothing.
type never struct{ closed chan struct{} }

func (n never) Read([]byte) (int, error) {
	<-n.closed
	return 0, io.EOF
}

func TestSilenceIsNoAnswer(t *testing.T) {
	in := never{make(chan struct{})}
	defer close(in.closed)
	_, err := ask(t.Context(), in, io.Discard, "instar", "Well?", 10*time.Millisecond)
	if exitCode(err) != exitPrompt {
		t.Errorf("silence gives %v, exit status %d; want %d", err, exitCode(err), exitPrompt)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ask(ctx, in, io.Discard, "instar", "Well?", time.Hour); exitCode(err) != exitInterrupt {
		t.Errorf("a cancelled question gives %v, want exit status %d", err, exitInterrupt)
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"1": 1, "10m": 10 << 20, "10M": 10 << 20, "1KiB": 1 << 10, "2g": 2 << 30, "3tb": 3 << 40} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "0", "-1", "k", "1x", "9999999t", "1.5g", "b"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", s, got)
		}
	}
}

func TestVolumeSize(t *testing.T) {
	for s, want := range map[string]int64{"": 10 << 30, "300": 300 << 20, "auto": 0, "1g": 1 << 30} {
		if got, _, err := volumeSize(s); err != nil || got != want {
			t.Errorf("volumeSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"0", "-5", "big", "99999999999999"} {
		if _, _, err := volumeSize(s); exitCode(err) != exitUsage {
			t.Errorf("volumeSize(%q) = %v, want a usage error", s, err)
		}
	}
}

func TestParseUUID(t *testing.T) {
	for _, s := range []string{"x", "12345678", "00000000-0000-0000-0000-000000000000", strings.Repeat("a", 34)} {
		if u, err := parseUUID(s); err == nil {
			t.Errorf("parseUUID(%q) = %x, want an error", s, u)
		}
	}
	a, errA := parseUUID("new")
	b, errB := parseUUID("new")
	if errA != nil || errB != nil || *a == *b {
		t.Errorf("two new UUIDs: %x, %x, %v, %v", a, b, errA, errB)
	}
}

func TestCredentialExpiry(t *testing.T) {
	now := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	for s, want := range map[string]int{"": 0, "2026-01-02T00:00:01Z": 0, "2026-01-01T00:00:00Z": exitS3, "soon": exitUsage} {
		if got := exitCode(checkExpiry(s, now)); got != want {
			t.Errorf("AWS_CREDENTIAL_EXPIRATION=%q gives exit status %d, want %d", s, got, want)
		}
	}
}

// TestHelpSaysNoSecret: what the environment holds is not shown as a default.
func TestHelpSaysNoSecret(t *testing.T) {
	env := map[string]string{"AWS_SECRET_ACCESS_KEY": "TOPSECRET", "AWS_ACCESS_KEY_ID": "KEYID", "AWS_SESSION_TOKEN": "TOKENSECRET"}
	for _, args := range [][]string{{"instar", "config"}, {"instar", "upload-bundle", "--help"}, {"instar", "upload-bundle", "--manual"}} {
		var out, errs bytes.Buffer
		if code := run(args, strings.NewReader(""), &out, &errs, func(k string) string { return env[k] }); code != 0 {
			t.Errorf("%v: exit status %d: %s", args, code, &errs)
		}
		for _, s := range []string{"TOPSECRET", "TOKENSECRET"} {
			if strings.Contains(out.String()+errs.String(), s) {
				t.Errorf("%v shows a secret", args)
			}
		}
	}
}

func TestManualsAndCompletions(t *testing.T) {
	dir := t.TempDir()
	if err := writeManuals(testRoot(), dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"man1/instar.1", "man1/instar-bundle-vol.1", "completion/instar.bash", "completion/_instar", "completion/instar.fish"} {
		data, err := os.ReadFile(dir + "/" + name)
		if err != nil || len(data) == 0 {
			t.Errorf("%s: %d bytes, %v", name, len(data), err)
		}
		if strings.HasPrefix(name, "man1") {
			for _, section := range []string{".TH ", ".SH NAME", ".SH EXIT STATUS", ".SH ENVIRONMENT", ".SH FILES", ".SH EXAMPLES"} {
				if !bytes.Contains(data, []byte(section)) {
					t.Errorf("%s has no %s", name, section)
				}
			}
		}
	}
	for _, c := range testRoot().Commands() {
		if !c.Hidden && c.Name() != "completion" && (c.Long == "" || c.Example == "") {
			t.Errorf("%s does not teach: it has no description or no example", c.Name())
		}
	}
	var out bytes.Buffer
	if code := run([]string{"instar", "__complete", "bundle-vol", "--partition", ""}, strings.NewReader(""), &out, io.Discard, func(string) string { return "" }); code != 0 || !strings.Contains(out.String(), "gpt\n") {
		t.Errorf("completion of --partition: %q", out.String())
	}
}
