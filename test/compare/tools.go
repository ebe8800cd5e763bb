package compare

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
)

// Tools compares two hierarchies with rsync, getfacl and getcap and returns the
// differences they see, one a line. Top-level names in skip are left out; paths
// over PATH_MAX are beyond these tools.
func Tools(a, b string, skip ...string) ([]string, error) {
	diffs, err := rsync(a, b, skip)
	if err != nil {
		return nil, err
	}
	for _, tool := range []struct {
		name string
		args []string
		sep  string
	}{
		{"getfacl", []string{"--recursive", "--physical", "--numeric", "--absolute-names"}, "\n\n"},
		{"getcap", []string{"-n", "-r"}, "\n"},
	} {
		outA, err := list(tool.name, tool.args, tool.sep, a, skip)
		if err != nil {
			return nil, err
		}
		outB, err := list(tool.name, tool.args, tool.sep, b, skip)
		if err != nil {
			return nil, err
		}
		for _, d := range missing(outA, outB) {
			diffs = append(diffs, fmt.Sprintf("%s: gone: %q", tool.name, d))
		}
		for _, d := range missing(outB, outA) {
			diffs = append(diffs, fmt.Sprintf("%s: new: %q", tool.name, d))
		}
	}
	return diffs, nil
}

// rsync asks what rsync would do to make b like a, times to the nanosecond,
// content by checksum: nothing, if they are equal.
func rsync(a, b string, skip []string) ([]string, error) {
	args := []string{"-aHAXnc", "--delete", "--itemize-changes", "--numeric-ids", "--modify-window=-1", "--8-bit-output"}
	for _, name := range skip {
		args = append(args, "--exclude=/"+name)
	}
	out, err := exec.Command("rsync", append(args, a+"/", b+"/")...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("rsync: %w\n%.2000s", err, out)
	}
	return lines(string(out), "\n", "rsync: "), nil
}

// list runs a recursive lister inside a hierarchy and returns its records, sorted.
func list(name string, args []string, sep, root string, skip []string) ([]string, error) {
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if !slices.Contains(skip, e.Name()) {
			names = append(names, "./"+e.Name())
		}
	}
	cmd := exec.Command(name, append(args, names...)...)
	cmd.Dir = filepath.Clean(root)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s in %s: %w\n%.2000s", name, root, err, errs.String())
	}
	if errs.Len() > 0 {
		return nil, fmt.Errorf("%s in %s complains: %.2000s", name, root, errs.String())
	}
	records := lines(string(out), sep, "")
	sort.Strings(records)
	return records, nil
}

func lines(s, sep, prefix string) []string {
	var out []string
	for l := range strings.SplitSeq(s, sep) {
		if strings.TrimSpace(l) != "" {
			out = append(out, prefix+l)
		}
	}
	return out
}

// missing is what sorted a has and sorted b has not.
func missing(a, b []string) []string {
	var out []string
	for _, s := range a {
		if i := sort.SearchStrings(b, s); i == len(b) || b[i] != s {
			out = append(out, s)
		}
	}
	return out
}
