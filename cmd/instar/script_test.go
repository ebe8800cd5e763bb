package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/moby/sys/mountinfo"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/freeport"
)

// The program is tested as a black box: scripts in testdata/script run it under
// its own name and under those of the peers.
func TestMain(m *testing.M) {
	commands := map[string]func(){"instar": main, "ec2-run-instances": main}
	for _, n := range peerNames() {
		commands[n] = main
	}
	testscript.Main(m, commands)
}

// metadataTree is what the instance metadata of the scripts says, at $IMDS.
var metadataTree = map[string]string{
	"ami-id": "ami-22222222", "ancestor-ami-ids": "ami-11111111", "kernel-id": "aki-fromimds", "ramdisk-id": "ari-fromimds",
	"product-codes": "IMDSCODE", "block-device-mapping/": "ami\nroot", "block-device-mapping/ami": "sda1", "block-device-mapping/root": "/dev/sda1",
	"instance-id": "i-0123456789abcdef0", "local-hostname": "web-1", "public-keys/": "0=laptop",
	"public-keys/0/openssh-key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqIPd7b19kHzxcBjHGZw2E73YQM8XtzNK8VgrXRdpt2 laptop",
	"spot/instance-action":      `{"action":"terminate","time":"2030-01-01T00:02:00Z"}`,
	"../user-data":              "#!/bin/sh\necho the secret is hunter2; exit 3\n",
}

func serveMetadata(w http.ResponseWriter, r *http.Request) {
	const token = "token"
	if r.Method == http.MethodPut {
		fmt.Fprint(w, token)
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")
	if r.URL.Path == "/latest/user-data" {
		path = "../user-data"
	}
	v, ok := metadataTree[path]
	if r.Header.Get("X-aws-ec2-metadata-token") != token || !ok {
		http.NotFound(w, r)
		return
	}
	fmt.Fprint(w, v)
}

func TestScript(t *testing.T) {
	fixtures, err := filepath.Abs("../../bundle/ec2/testdata/fixtures")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			s3 := httptest.NewServer(gofakes3.New(s3mem.New()).Server())
			env.Defer(s3.Close)
			env.Defer(func() { unmountBelow(t, env.WorkDir) })
			imds := httptest.NewServer(http.HandlerFunc(serveMetadata))
			env.Defer(imds.Close)
			for _, d := range []string{"home", "etc", "tmp"} {
				if err := os.MkdirAll(filepath.Join(env.WorkDir, d), 0o755); err != nil {
					return err
				}
			}
			for k, v := range map[string]string{
				"PORT": strconv.Itoa(freeport.Port(t)),
				"FIX":  fixtures, "KEYS": filepath.Join(fixtures, "keys"), "HOME": filepath.Join(env.WorkDir, "home"),
				"INSTAR_ETC": filepath.Join(env.WorkDir, "etc"), "INSTAR_STATE": filepath.Join(env.WorkDir, "state"), "TMPDIR": filepath.Join(env.WorkDir, "tmp"),
				"S3": s3.URL, "IMDS": imds.URL, "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1",
				"SIGN": "-k", "PATH": env.Getenv("PATH") + ":/usr/sbin:/sbin",
			} {
				env.Setenv(k, v)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "jsonlines": jsonLines, "waitsocket": waitSocket},
	})
}

// unmountBelow unmounts what a script that failed has left.
func unmountBelow(t *testing.T, dir string) {
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Error(err)
	}
	for _, m := range list {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
}

// exits runs a command that must end with the given exit status.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS COMMAND [ARG]...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("%s exits with %d, want %d", args[1], got, want)
	}
}

// jsonLines checks that the last command's stdout or stderr is one object a
// line, each with a message_type that is among those given, and that each
// of these occurs.
func jsonLines(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: jsonlines stdout|stderr TYPE...")
	}
	seen := map[string]bool{}
	for s := bufio.NewScanner(strings.NewReader(ts.ReadFile(args[0]))); s.Scan(); {
		var o map[string]any
		if err := json.Unmarshal(s.Bytes(), &o); err != nil {
			ts.Fatalf("%s: %q is no JSON object: %v", args[0], s.Text(), err)
		}
		kind, _ := o["message_type"].(string)
		seen[kind] = true
	}
	for _, a := range args[1:] {
		if !seen[a] {
			ts.Fatalf("%s has no object of type %q, but %v", args[0], a, seen)
		}
		delete(seen, a)
	}
	for k := range seen {
		ts.Fatalf("%s has an object of type %q", args[0], k)
	}
}

// waitSocket waits until somebody listens at a unix socket.
func waitSocket(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitsocket PATH")
	}
	for range 2400 {
		if c, err := (&net.Dialer{}).Dial("unix", args[0]); err == nil {
			c.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	ts.Fatalf("nobody listens at %s", args[0])
}
