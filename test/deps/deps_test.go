// Package deps proves the direction of the module's imports: cmd → agent,
// initrd, metadata → upload → bundle, and the few sideways ones that are meant.
package deps

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/instar-image/instar"

// rank orders the top level: a package imports only from below, or from its own
// top-level folder. What internal has is for all, and knows none of them.
var rank = map[string]int{
	"internal": -1, "bundle": 0, "upload": 1, "metadata": 2, "initrd": 2, "agent": 2, "cmd": 3, "test": 4,
}

// sideways are the imports between folders of one rank that are meant.
var sideways = []struct{ from, to string }{
	{"agent/capture", "initrd"},        // the kernel and initrd travel with the image
	{"agent/capture", "metadata/imds"}, // --inherit asks the machine's metadata
	{"agent/boot", "metadata/imds"},    // who this machine is
	{"agent/watch", "metadata/imds"},   // spot and maintenance notices
	{"initrd/boot", "agent/inject"},
	{"initrd/boot", "metadata/ticket"}, // the client's half of launch tickets
	{"initrd/launch", "metadata"},
}

// forbidden are imports, direct or not, that a package must not reach.
var forbidden = []struct {
	from string // a folder of the module: it and all below
	to   []string
}{
	{"bundle", []string{"net/http", "github.com/aws", "github.com/spf13/cobra", "github.com/rs/zerolog"}},
	{"bundle/ext4", []string{module + "/bundle/rootfs", module + "/bundle/ec2"}},
	{"bundle/rootfs", []string{module + "/bundle/ext4", module + "/bundle/ec2"}},
	{"bundle/ec2", []string{module + "/bundle/rootfs", module + "/bundle/ext4"}},
	{"bundle/chunked", []string{module + "/bundle/rootfs", module + "/bundle/ext4", module + "/bundle/ec2"}},
	{"bundle/qcow2", []string{module + "/bundle/ec2", module + "/bundle/chunked"}},
	{"upload", []string{"github.com/spf13/cobra"}},
	{"metadata", []string{"github.com/spf13/cobra"}},
	{"agent", []string{"github.com/spf13/cobra"}},
	{"internal/durable", []string{"net"}},
	{"cmd/instar-init", []string{"github.com/hanwen/go-fuse"}},
	{"initrd/boot", []string{"github.com/spf13/cobra", "github.com/aws"}},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"/...").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatalf("go list's output: %v", err)
		}
		pkgs = append(pkgs, p)
	}
}

// below reports whether p is folder or something in it.
func below(p, folder string) bool { return p == folder || strings.HasPrefix(p, folder+"/") }

func top(folder string) string {
	first, _, _ := strings.Cut(folder, "/")
	return first
}

// complaint says why package from must not import to (both folders of the
// module), or nothing.
func complaint(from, to string) string {
	rf, known := rank[top(from)]
	if !known {
		return "folder " + top(from) + " has no place in the module's order"
	}
	rt, known := rank[top(to)]
	switch {
	case !known:
		return "folder " + top(to) + " has no place in the module's order"
	case top(from) == top(to), rt < rf:
		return ""
	case slices.ContainsFunc(sideways, func(s struct{ from, to string }) bool {
		return below(from, s.from) && below(to, s.to)
	}):
		return ""
	}
	return from + " imports " + to + ", which is not below it"
}

func TestDirection(t *testing.T) {
	pkgs := list(t)
	if len(pkgs) == 0 {
		t.Fatal("no packages")
	}
	for _, p := range pkgs {
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		for _, imp := range p.Imports {
			if !below(imp, module) {
				continue
			}
			if c := complaint(from, strings.TrimPrefix(imp, module+"/")); c != "" {
				t.Error(c)
			}
		}
		for _, f := range forbidden {
			if !below(from, f.from) {
				continue
			}
			for _, dep := range p.Deps {
				if slices.ContainsFunc(f.to, func(to string) bool { return below(dep, to) }) {
					t.Errorf("%s reaches %s", from, dep)
				}
			}
		}
	}
}

// TestOldCryptography keeps what the EC2 format makes necessary where it is.
func TestOldCryptography(t *testing.T) {
	seen := false
	for _, p := range list(t) {
		if !slices.Contains(p.Imports, "crypto/sha1") {
			continue
		}
		if p.ImportPath != module+"/bundle/ec2" {
			t.Errorf("%s imports crypto/sha1, which only bundle/ec2 needs", p.ImportPath)
			continue
		}
		seen = true
	}
	if !seen {
		t.Error("bundle/ec2 is not seen to import crypto/sha1: this test looks in the wrong place")
	}
}

func TestComplaint(t *testing.T) {
	for _, c := range []struct {
		from, to string
		refused  bool
	}{
		{"cmd/instar", "agent/capture", false},
		{"cmd/instar", "bundle/ec2", false},
		{"upload", "bundle", false},
		{"bundle/ec2", "bundle/keys", false},
		{"agent/capture", "initrd", false},
		{"initrd/boot", "agent/inject", false},
		{"initrd/boot", "agent/capture", true},
		{"bundle/ec2", "upload", true},
		{"upload", "agent", true},
		{"metadata", "agent", true},
		{"agent", "cmd/instar", true},
		{"util", "bundle", true},
		{"bundle", "util", true},
		{"bundle/keys", "internal/durable", false},
		{"internal/serving", "bundle/keys", true},
	} {
		if got := complaint(c.from, c.to) != ""; got != c.refused {
			t.Errorf("%s → %s refused: %v, want %v", path.Clean(c.from), c.to, got, c.refused)
		}
	}
}

// TestTable holds the table of docs/architecture.md against the packages: each
// but commands, tests and what only one folder may import has its row.
func TestTable(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		rows[m[1]] = true
	}
	helpers := []string{"upload/storetest", "upload/s3fault"} // of tests
	for _, p := range list(t) {
		folder := strings.TrimPrefix(p.ImportPath, module+"/")
		switch {
		case below(folder, "cmd"), below(folder, "test"), strings.Contains(folder, "/internal/"), slices.Contains(helpers, folder):
		case !rows[folder]:
			t.Errorf("docs/architecture.md has no row of %s", folder)
		}
		delete(rows, folder)
	}
	for folder := range rows {
		t.Errorf("docs/architecture.md has a row of %s, which is not there", folder)
	}
}
