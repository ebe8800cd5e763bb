package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// TestHostileBundles damages bundles as an attacker or a bad disk would. Every
// command that opens one must end with the right exit code and one clear line,
// and leave nothing.
func TestHostileBundles(t *testing.T) {
	i := instar.New(t)
	good, _ := bundled(t, i)
	foreign, _ := bundled(t, i) // same user, same keys, same names, other key and iv
	stranger := instar.MakeKeys(t, t.TempDir())
	theirs := t.TempDir() // signed by somebody else, who knows the user's certificate
	i.Want(t, instar.OK, "bundle-image", "-i", diskImage(t, 16<<20), "-p", "b", "-d", theirs, "--part-size", "32768",
		"-k", stranger.UserKey, "-c", stranger.UserCert, "--ec2cert", i.Keys.UserCert, "-u", instar.Account, "-r", "x86_64")

	parts := slices.DeleteFunc(names(t, good), func(n string) bool { return !strings.Contains(n, ".part.") })
	first, last, manifest := parts[0], parts[len(parts)-1], "b.manifest.xml"
	edit := func(name string, change func(string) string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			t.Helper()
			file := filepath.Join(dir, name)
			old := read(t, file)
			new := change(old)
			if new == old {
				t.Fatalf("%s did not change", name)
			}
			if err := os.WriteFile(file, []byte(new), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	replace := func(old, new string) func(string) string {
		return func(s string) string { return strings.Replace(s, old, new, 1) }
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		codes  []int
	}{
		{"a bit of the first part", edit(first, func(s string) string { return s[:100] + string(s[100]^1) + s[101:] }), trust},
		{"a bit of the last part", edit(last, func(s string) string { return s[:len(s)-1] + string(s[len(s)-1]^1) }), trust},
		{"part truncated by one", edit(first, func(s string) string { return s[:len(s)-1] }), trust},
		{"part truncated by a block", edit(last, func(s string) string { return s[:len(s)-16] }), trust},
		{"part empty", edit(first, func(string) string { return "" }), trust},
		{"part longer", edit(last, func(s string) string { return s + "0123456789abcdef" }), trust},
		{"part missing", func(t *testing.T, dir string) { remove(t, dir, first) }, []int{instar.File, instar.S3, instar.Trust}},
		{"last part missing", func(t *testing.T, dir string) { remove(t, dir, last) }, []int{instar.File, instar.S3, instar.Trust}},
		{"parts swapped", func(t *testing.T, dir string) {
			rename(t, dir+"/"+first, dir+"/x")
			rename(t, dir+"/"+parts[1], dir+"/"+first)
			rename(t, dir+"/x", dir+"/"+parts[1])
		}, trust},
		{"part of another bundle", func(t *testing.T, dir string) { loopfs.Run(t, "cp", foreign+"/"+first, dir+"/"+first) }, trust},
		{"all parts of another bundle", func(t *testing.T, dir string) {
			loopfs.Run(t, "bash", "-c", `cp "$1"/b.part.* "$2"`, "bash", foreign, dir)
		}, trust},
		{"manifest of another bundle", func(t *testing.T, dir string) { loopfs.Run(t, "cp", foreign+"/"+manifest, dir+"/"+manifest) }, trust},
		{"bundle of somebody else", func(t *testing.T, dir string) {
			loopfs.Run(t, "bash", "-c", `rm "$2"/*; cp "$1"/* "$2"`, "bash", theirs, dir)
		}, trust},
		{"signature stripped", edit(manifest, cut("<signature>", "</signature>")), []int{instar.Trust, instar.Usage}},
		{"signature says UNSIGNED", edit(manifest, func(s string) string {
			return s[:strings.Index(s, "<signature>")] + "<signature>UNSIGNED</signature></manifest>"
		}), trust},
		{"signature emptied", edit(manifest, func(s string) string {
			return s[:strings.Index(s, "<signature>")] + "<signature></signature></manifest>"
		}), []int{instar.Trust, instar.Usage}},
		{"signed name changed", edit(manifest, replace("<name>b</name>", "<name>c</name>")), trust},
		{"signed architecture changed", edit(manifest, replace("x86_64", "i386")), trust},
		{"part name leads out", edit(manifest, replace("<filename>"+first, "<filename>../"+first)), []int{instar.Trust, instar.Usage}},
		{"wrapped: signed block in a comment", edit(manifest, wrap("<!--", "-->")), []int{instar.Trust, instar.Usage}},
		{"wrapped: signed block in CDATA", edit(manifest, wrap("<![CDATA[", "]]>")), []int{instar.Trust, instar.Usage}},
		{"second image element", edit(manifest, func(s string) string {
			image := s[strings.Index(s, "<image>") : strings.Index(s, "</image>")+len("</image>")]
			return strings.Replace(s, "<signature>", strings.Replace(image, "<name>b", "<name>evil", 1)+"<signature>", 1)
		}), []int{instar.Trust, instar.Usage}},
		{"entity bomb", edit(manifest, func(s string) string {
			return `<!DOCTYPE m [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>` + s
		}), []int{instar.Trust, instar.Usage}},
		{"manifest truncated", edit(manifest, func(s string) string { return s[:len(s)/2] }), []int{instar.Trust, instar.Usage}},
		{"manifest empty", edit(manifest, func(string) string { return "" }), []int{instar.Trust, instar.Usage}},
		{"manifest is something else", edit(manifest, func(string) string { return "\x7fELF\x02\x01\x01" }), []int{instar.Trust, instar.Usage}},
		{"manifest too new", edit(manifest, replace("2007-10-10", "2031-01-01")), []int{instar.Trust, instar.Usage}},
		{"manifest missing", func(t *testing.T, dir string) { remove(t, dir, manifest) }, []int{instar.File, instar.S3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			loopfs.Run(t, "cp", "-a", good+"/.", dir)
			c.damage(t, dir)
			home := t.TempDir() // where a program would leave things by default
			i := *i
			i.Home = home
			for _, command := range [][]string{
				{"unbundle", "-m", dir + "/" + manifest, "-s", dir, "-k", i.Keys.UserKey, "-d"},
				{"unbundle", "-m", dir + "/" + manifest, "-s", dir, "-k", i.Keys.CloudKey, "-c", i.Keys.UserCert, "-d"},
				{"download-and-unbundle", "-b", "file://" + dir, "-p", "b", "-k", i.Keys.UserKey, "-d"},
				{"verify", "-m", dir + "/" + manifest, "-c", i.Keys.UserCert},
			} {
				out := t.TempDir()
				args := command
				if command[len(command)-1] == "-d" {
					args = append(slices.Clone(command), out)
				}
				r := i.Run(t, args...)
				if !slices.Contains(c.codes, r.Code) {
					t.Errorf("%s: exit code %d, want one of %v\n%s", command[0], r.Code, c.codes, r)
				}
				if !strings.Contains(r.Stderr, "error: ") || strings.Contains(r.Stderr, "panic") || strings.Contains(r.Stderr, "goroutine") {
					t.Errorf("%s: no clear line: %s", command[0], r)
				}
				nothingIn(t, out)
			}
			nothingIn(t, home)
		})
	}
}

// trust is the exit code of what is not what was signed.
var trust = []int{instar.Trust}

func remove(t testing.TB, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func cut(from, to string) func(string) string {
	return func(s string) string {
		a, b := strings.Index(s, from), strings.Index(s, to)
		return s[:a] + s[b+len(to):]
	}
}

// wrap hides the signed image element where a raw search finds it first, and
// lets an XML reader find another.
func wrap(open, end string) func(string) string {
	return func(s string) string {
		a, b := strings.Index(s, "<image>"), strings.Index(s, "</image>")+len("</image>")
		image := s[a:b]
		return s[:a] + open + image + end + strings.Replace(image, "<name>b", "<name>evil", 1) + s[b:]
	}
}

// TestWrongKey opens with a key the bundle was not made for.
func TestWrongKey(t *testing.T) {
	i := instar.New(t)
	dir, _ := bundled(t, i)
	other := instar.MakeKeys(t, t.TempDir())
	manifest := dir + "/b.manifest.xml"
	for name, c := range map[string]struct {
		args  []string
		codes []int
	}{
		"other key":                 {[]string{"-k", other.UserKey}, []int{instar.Trust}},
		"other key, right cert":     {[]string{"-k", other.UserKey, "-c", i.Keys.UserCert}, []int{instar.Usage, instar.Trust}},
		"cloud's key without cert":  {[]string{"-k", i.Keys.CloudKey}, []int{instar.Trust, instar.Usage}},
		"right key, other cert":     {[]string{"-k", i.Keys.UserKey, "-c", other.UserCert}, []int{instar.Trust}},
		"a certificate as key":      {[]string{"-k", i.Keys.UserCert}, []int{instar.Usage, instar.File}},
		"a file that is not there":  {[]string{"-k", dir + "/none"}, []int{instar.File}},
		"an image in place of keys": {[]string{"-k", dir + "/" + partName(t, dir)}, []int{instar.Usage, instar.File}},
	} {
		t.Run(name, func(t *testing.T) {
			out := t.TempDir()
			r := i.Run(t, append([]string{"unbundle", "-m", manifest, "-s", dir, "-d", out}, c.args...)...)
			if !slices.Contains(c.codes, r.Code) {
				t.Errorf("exit code %d, want one of %v: %s", r.Code, c.codes, r)
			}
			nothingIn(t, out)
		})
	}
}

// TestSecretsStayOffCommandLines looks at what other users see of a running
// capture: neither key nor iv is in any command line.
func TestSecretsStayOffCommandLines(t *testing.T) {
	i := instar.New(t)
	root := smallVolume(t)
	dir := t.TempDir()
	trace := filepath.Join(t.TempDir(), "trace")
	args := append([]string{"-f", "-qq", "-s", "4096", "-e", "trace=execve", "-o", trace, i.Program}, vol(i, root, "-p", "b", "-d", dir)...)
	cmd := exec.Command("strace", args...)
	cmd.Env = i.Environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	key := strings.TrimSpace(loopfs.Run(t, "bash", "-c", `
x=$(cat "$1/b.manifest.xml"); x=${x#*<user_encrypted_key*>}; printf %s "${x%%<*}" | xxd -r -p | openssl pkeyutl -decrypt -inkey "$2"`, "bash", dir, i.Keys.UserKey))
	if len(key) != 32 {
		t.Fatalf("the bundle's key is %q", key)
	}
	if calls := read(t, trace); strings.Contains(calls, key) || !strings.Contains(calls, "bundle-vol") {
		t.Errorf("the key is on a command line, or nothing was traced:\n%s", calls)
	}
}
