package rootfs

import (
	"bytes"
	"path"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	maxSearched = 64 << 10 // bytes of a file that is searched wherever data is kept
	maxKeyLike  = 1 << 20  // bytes of a file whose name speaks of a key
	minSwap     = 40 << 10 // bytes of the smallest swap file mkswap(8) makes
)

// contentScope says for people which files are searched.
const contentScope = `Searched is every regular file of up to 64 KiB outside the trees that packages own, and everywhere every file of up to 1 MiB whose name
speaks of a key (*.pem, *.key, *.p8 …, "private", "secret", "credential", "id_rsa" … in it). Trees that packages own: /usr except /usr/local, /lib*,
/bin, /sbin, /boot, /snap, /nix/store, /gnu/store, the package managers' databases in /var/lib, containers' layers. Not searched at all are the
caches and trees of programming languages' packages (site-packages, node_modules, go/pkg/mod, .cargo/registry, gems …): what they hold is
published, test keys included. Swap space is recognised in any file of root's that no one else may read. Certificates, public keys and package
managers' keyrings have none of the findings and stay in.`

// finding is a kind of content that must stay out.
type finding struct {
	class Class
	why   string
	text  string   // how it is recognised, for people
	hints []string // it contains one of these: quick to look for
	re    *regexp.Regexp
	code  bool     // counts in source code and documentation, too
	only  []string // if any: names of the files it counts in
}

// findings are what is looked for. A marker alone is no finding: programs
// that handle keys contain it; it has to be followed by the key.
func findings() []finding {
	re := regexp.MustCompile
	return []finding{
		{
			class: Secret, why: "private key", text: "`-----BEGIN … PRIVATE KEY-----` or `… PGP PRIVATE KEY BLOCK-----` followed by base64", code: true,
			hints: []string{"PRIVATE KEY-----", "PRIVATE KEY BLOCK-----"},
			re: re(`-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----` + // also in YAML, JSON and C strings
				`(?:[\s"'+]|\\[nrt]|(?:Proc-Type|DEK-Info|Version|Comment|Hash): ?[^\r\n\\]*)*[A-Za-z0-9+/=]{16}`),
		},
		{
			class: Secret, why: "PuTTY private key", text: "`PuTTY-User-Key-File-N:` at its beginning", code: true,
			hints: []string{"PuTTY-User-Key-File-"}, re: re(`^PuTTY-User-Key-File-[0-9]:`),
		},
		{
			class: Secret, why: "age identity", text: "`AGE-SECRET-KEY-1…`, not in source code",
			hints: []string{"AGE-SECRET-KEY-"}, re: re(`AGE-SECRET-KEY-(?:PQ-)?1[0-9A-Z]{40}`),
		},
		{
			class: Secret, why: "AWS secret access key", text: "`aws_secret_access_key`, `SecretAccessKey` … and 40 characters, not in source code",
			hints: []string{"secret_access_key", "SECRET_ACCESS_KEY", "SecretAccessKey", "secretAccessKey", "secret_key", "SECRET_KEY"},
			re:    re(`(?i)secret_?(?:access_?)?key["']?\s*[=:]\s*["']?[A-Za-z0-9/+]{40}(?:[^A-Za-z0-9/+=]|$)`),
		},
		{
			class: Secret, why: "registry token", text: "`_authToken=`, `_auth=` or `_password=` in .npmrc or .yarnrc",
			hints: []string{"_auth", "_password"}, re: re(`(?m)^[^#;\n]*_(?:authToken|auth|password)\s*=\s*\S`),
			only: []string{".npmrc", ".yarnrc", ".yarnrc.yml", "npmrc"},
		},
		{
			class: Secret, why: "WireGuard private key", text: "`PrivateKey = ` and 44 characters, not in source code",
			hints: []string{"PrivateKey"}, re: re(`(?m)^\s*PrivateKey\s*=\s*[A-Za-z0-9+/]{43}=`),
		},
		{
			class: Secret, why: "token of a code forge", text: "`ghp_…`, `github_pat_…`, `glpat-…`, not in source code",
			hints: []string{"ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"},
			re:    re(`\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60}|glpat-[A-Za-z0-9_-]{20})`),
		},
	}
}

// packageTrees hold what the distribution's packages install, byte for byte
// the same elsewhere, and most of a system's files.
var packageTrees = []string{
	"usr/", "lib/", "lib32/", "lib64/", "libx32/", "bin/", "sbin/", "boot/", "snap/", "nix/store/", "gnu/store/",
	"var/lib/dpkg/", "var/lib/apt/", "var/lib/rpm/", "var/lib/pacman/", "var/lib/snapd/", "var/cache/",
	"var/lib/docker/overlay2/", "var/lib/containerd/", "var/lib/containers/storage/overlay/",
}

// published are directories, anywhere, of programming languages' packages.
var published = []string{
	"/site-packages/", "/dist-packages/", "/node_modules/", "/go/pkg/mod/", "/.cargo/registry/", "/.rustup/toolchains/", "/.m2/repository/",
	"/.gradle/caches/", "/gems/", "/.pyenv/versions/", "/.rbenv/versions/", "/.nvm/versions/", "/.npm/_cacache/", "/usr/local/go/", "/usr/share/doc/",
}

// keyLike tells whether a file's name speaks of a key.
func keyLike(name string) bool {
	name = strings.ToLower(name)
	switch path.Ext(name) {
	case ".pem", ".key", ".p8", ".pk8", ".pvk", ".rsa", ".dsa", ".ed25519", ".ecdsa", ".secret", ".ovpn", ".kubeconfig", ".credentials", ".asc":
		return true
	}
	for _, s := range []string{"private", "privkey", "secret", "credential", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", ".pem.", ".key."} {
		if strings.Contains(name, s) {
			return true
		}
	}
	return false
}

// isCode tells by its name whether a file is source code or documentation.
func isCode(name string) bool {
	switch path.Ext(name) {
	case ".c", ".cc", ".cpp", ".cs", ".css", ".el", ".ex", ".go", ".h", ".hpp", ".html", ".java", ".js", ".jsx", ".kt", ".lua", ".m", ".map", ".md", ".mjs",
		".php", ".pl", ".pm", ".py", ".pyi", ".rb", ".rs", ".rst", ".scala", ".sh", ".swift", ".tmpl", ".ts", ".tsx", ".xsd", ".1", ".3", ".5", ".7", ".8":
		return true
	}
	return false
}

// searcher looks into files for findings. It is not for concurrent use.
type searcher struct {
	findings []finding
	buf      []byte

	dir                 string // the directory of the file looked at last
	published, packaged bool
}

func newSearcher() *searcher { return &searcher{findings: findings()} }

// wanted tells how many bytes of a file are to be searched, 0 for none.
func (s *searcher) wanted(rel string, size int64) int64 {
	if size == 0 || size > maxKeyLike {
		return 0
	}
	if dir := rel[:strings.LastIndexByte(rel, '/')+1]; dir != s.dir {
		s.dir, s.published, s.packaged = dir, isPublished(dir), inPackage(dir)
	}
	switch {
	case s.published:
		return 0
	case size <= maxSearched && !s.packaged, keyLike(path.Base(rel)) && !isCode(rel):
		return size
	}
	return 0
}

func isPublished(rel string) bool {
	return slices.ContainsFunc(published, func(p string) bool { return strings.Contains("/"+rel, p) })
}

func inPackage(rel string) bool {
	return slices.ContainsFunc(packageTrees, func(p string) bool { return strings.HasPrefix(rel, p) }) && !strings.HasPrefix(rel, "usr/local/")
}

// look searches an open regular file. A file that cannot be read has no
// findings: whoever captures its content will find out.
func (s *searcher) look(fd int, rel string, a *filetree.Attr) *finding {
	if a.UID == 0 && a.Mode&0o077 == 0 && a.Size >= minSwap && isSwap(fd) {
		return &finding{class: Swap, why: "swap space holds memory", text: "signature of mkswap"}
	}
	size := s.wanted(rel, a.Size)
	if size == 0 {
		return nil
	}
	if int64(cap(s.buf)) < size {
		s.buf = make([]byte, max(size, maxSearched))
	}
	n := 0
	for n < int(size) {
		k, err := retry(func() (int, error) { return unix.Pread(fd, s.buf[n:size], int64(n)) })
		if err != nil || k == 0 {
			break
		}
		n += k
	}
	return s.search(path.Base(rel), s.buf[:n])
}

func (s *searcher) search(name string, b []byte) *finding {
	code := isCode(name)
	for i := range s.findings {
		f := &s.findings[i]
		if code && !f.code || len(f.only) > 0 && !slices.Contains(f.only, name) {
			continue
		}
		if slices.ContainsFunc(f.hints, func(h string) bool { return bytes.Contains(b, []byte(h)) }) && f.re.Match(b) {
			return f
		}
	}
	return nil
}

// isSwap looks for the signature that mkswap(8) and hibernation leave at the
// end of the first page, for all page sizes Linux has.
func isSwap(fd int) bool {
	var b [10]byte
	for page := int64(4 << 10); page <= 64<<10; page *= 2 {
		n, err := retry(func() (int, error) { return unix.Pread(fd, b[:], page-10) })
		if err != nil || n != len(b) {
			return false
		}
		switch s := string(b[:]); {
		case s == "SWAPSPACE2", s == "SWAP-SPACE", strings.HasPrefix(s, "S1SUSPEND"), strings.HasPrefix(s, "S2SUSPEND"):
			return true
		}
	}
	return false
}

// content looks into an open regular file for what must stay out.
func (f *filter) content(fd int, rel string, a *filetree.Attr, check bool) *Omission {
	own := strings.HasPrefix(rel, "etc/instar/")
	if !check || !f.rules.filtering && !own {
		return nil
	}
	found := f.search.look(fd, rel, a)
	if found == nil {
		return nil
	}
	o := &Omission{Path: rel, Class: found.class, Rule: "content: " + found.text, Why: found.why}
	if own {
		o.Class, o.Why = Own, "a key of Instar's"
	}
	return o
}
