package keys

import (
	"bytes"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"
)

// ErrAllowedSigners is that of a file that is not an allowed_signers file, or
// has a line this program cannot follow. Such a file allows nobody: a line
// that is misread might have been one that forbids.
var ErrAllowedSigners = errors.New("malformed allowed_signers file")

// AllowedSigners is an allowed_signers file: whose signature counts for what.
// Its format is that of ssh-keygen(1), ALLOWED SIGNERS.
type AllowedSigners struct {
	entries []AllowedSigner
}

// AllowedSigner is one line of an allowed_signers file.
type AllowedSigner struct {
	Principals  string        // list of patterns with * and ?, a leading ! forbids: for which names it may sign
	Namespaces  string        // list of patterns: for which purposes, all if empty
	ValidAfter  time.Time     // it counts at and after, zero = always
	ValidBefore time.Time     // it counts at and before, zero = always
	Key         ssh.PublicKey // of a kind that signs
	Comment     string        // free text
	Line        int           // in the file, from 1
}

// ReadAllowedSigners reads the allowed_signers file at path.
func ReadAllowedSigners(path string) (*AllowedSigners, error) {
	return fromFile(path, "allowed signers", ParseAllowedSigners)
}

// ParseAllowedSigners reads an allowed_signers file. Lines are: principals,
// options (may be absent), kind of key, key in base64, comment. Times without
// a Z are in the machine's time zone, as for ssh-keygen. A certificate
// authority is refused, and so is a key that cannot sign: ErrAllowedSigners.
// A file without lines is right and allows nobody.
func ParseAllowedSigners(data []byte) (*AllowedSigners, error) {
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%w: %w", ErrAllowedSigners, ErrTooLarge)
	}
	if !utf8.Valid(data) || bytes.HasPrefix(data, []byte("\ufeff")) || bytes.IndexByte(data, 0) >= 0 {
		return nil, fmt.Errorf("%w: not plain text in UTF-8 without a byte order mark", ErrAllowedSigners)
	}
	a := &AllowedSigners{}
	n := 0
	for line := range strings.SplitSeq(string(data), "\n") {
		n++
		line = strings.Trim(line, " \t\r")
		if line == "" || line[0] == '#' {
			continue
		}
		e, err := parseAllowedSigner(line)
		if err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrAllowedSigners, n, err)
		}
		e.Line = n
		a.entries = append(a.entries, e)
	}
	return a, nil
}

// NewAllowedSigners is what a file with these lines would say.
func NewAllowedSigners(lines ...AllowedSigner) *AllowedSigners {
	return &AllowedSigners{slices.Clone(lines)}
}

// Entries are the lines, in their order.
func (a *AllowedSigners) Entries() []AllowedSigner { return slices.Clone(a.entries) }

// Grant is what a key may do by an allowed_signers file: sign for one name and
// purpose, perhaps not always.
type Grant struct {
	lines []AllowedSigner
}

// Check finds out whether key may sign for principal in namespace at some
// time: else ErrUntrusted. When is for Grant.At.
func (a *AllowedSigners) Check(key ssh.PublicKey, principal, namespace string) (*Grant, error) {
	want := key.Marshal()
	g := &Grant{}
	known, named := 0, 0
	for _, e := range a.entries {
		if !bytes.Equal(e.Key.Marshal(), want) {
			continue
		}
		known = e.Line
		if !matchList(principal, e.Principals) {
			continue
		}
		named = e.Line
		if e.Namespaces != "" && !matchList(namespace, e.Namespaces) {
			continue
		}
		g.lines = append(g.lines, e)
	}
	switch {
	case len(g.lines) > 0:
		return g, nil
	case named > 0:
		return nil, fmt.Errorf("%w: %s may sign for %q, but not in namespace %q (line %d)", ErrUntrusted, Fingerprint(key), principal, namespace, named)
	case known > 0:
		return nil, fmt.Errorf("%w: %s is allowed for other names, not for %q (line %d)", ErrUntrusted, Fingerprint(key), principal, known)
	}
	return nil, fmt.Errorf("%w: %s is not in the allowed_signers file (%d keys are)", ErrUntrusted, Fingerprint(key), len(a.entries))
}

// Knows says whether a key with this fingerprint (Fingerprint's) may sign for
// principal in namespace at some time.
func (a *AllowedSigners) Knows(fingerprint, principal, namespace string) bool {
	return slices.ContainsFunc(a.entries, func(e AllowedSigner) bool {
		return Fingerprint(e.Key) == fingerprint && matchList(principal, e.Principals) &&
			(e.Namespaces == "" || matchList(namespace, e.Namespaces))
	})
}

// At makes sure that the grant held at time t: else ErrExpired.
func (g *Grant) At(t time.Time) error {
	for _, e := range g.lines {
		if (e.ValidAfter.IsZero() || !t.Before(e.ValidAfter)) && (e.ValidBefore.IsZero() || !t.After(e.ValidBefore)) {
			return nil
		}
	}
	return fmt.Errorf("%w: %s, line %d", ErrExpired, t.UTC().Format(time.RFC3339), g.lines[0].Line)
}

// String is the line as it stands in a file, without its end.
func (e AllowedSigner) String() string {
	var opts []string
	if e.Namespaces != "" {
		opts = append(opts, `namespaces="`+strings.ReplaceAll(e.Namespaces, `"`, `\"`)+`"`)
	}
	const stamp = "20060102150405Z"
	if !e.ValidAfter.IsZero() {
		opts = append(opts, `valid-after="`+e.ValidAfter.UTC().Format(stamp)+`"`)
	}
	if !e.ValidBefore.IsZero() {
		opts = append(opts, `valid-before="`+e.ValidBefore.UTC().Format(stamp)+`"`)
	}
	fields := []string{e.Principals}
	if strings.ContainsAny(e.Principals, " \t") || strings.HasPrefix(e.Principals, "#") {
		fields[0] = `"` + e.Principals + `"`
	}
	if len(opts) > 0 {
		fields = append(fields, strings.Join(opts, ","))
	}
	fields = append(fields, SSHKeyLine(e.Key))
	if e.Comment != "" {
		fields = append(fields, e.Comment)
	}
	return strings.Join(fields, " ")
}

// SSHKeyLine is key as one line: kind and base64.
func SSHKeyLine(key ssh.PublicKey) string {
	return key.Type() + " " + base64.StdEncoding.EncodeToString(key.Marshal())
}

func parseAllowedSigner(line string) (e AllowedSigner, err error) {
	rest := ""
	if line[0] == '"' {
		end := strings.IndexByte(line[1:], '"')
		if end < 0 {
			return e, errors.New("principals: no closing quote")
		}
		e.Principals, rest = line[1:1+end], strings.TrimLeft(line[end+2:], " \t")
		if rest == line[end+2:] {
			return e, errors.New("principals: text behind the closing quote")
		}
	} else if e.Principals, rest, _ = cutField(line); strings.Contains(e.Principals, `"`) {
		return e, errors.New("principals: a quote inside")
	}
	if err := checkPatterns(e.Principals); err != nil {
		return e, fmt.Errorf("principals: %w", err)
	}
	kind, after, _ := cutField(rest)
	if !isKeyType(kind) {
		var opts string
		if opts, after, err = cutOptions(rest); err != nil {
			return e, err
		}
		if err = e.options(opts); err != nil {
			return e, err
		}
		kind, after, _ = cutField(after)
	}
	text, comment, _ := cutField(after)
	if e.Key, err = parseSSHKey(kind, text); err != nil {
		return e, err
	}
	e.Comment = comment
	return e, CheckSigningKey(e.Key)
}

// options reads what stands between principals and key. ssh-keygen wants
// values in double quotes and takes each option once.
func (e *AllowedSigner) options(text string) error {
	seen := map[string]bool{}
	for {
		name := text
		if i := strings.IndexAny(text, "=,"); i >= 0 {
			name = text[:i]
		}
		text = text[len(name):]
		name = strings.ToLower(name)
		if seen[name] {
			return fmt.Errorf("option %q twice", name)
		}
		seen[name] = true
		if name == "cert-authority" {
			return errors.New("cert-authority: certificates are not supported; list the signers' own keys")
		}
		if name != "namespaces" && name != "valid-after" && name != "valid-before" {
			return fmt.Errorf("%q is neither an option nor a kind of key", name)
		}
		value, rest, err := quoted(strings.TrimPrefix(text, "="))
		if err != nil || text[0] != '=' {
			return fmt.Errorf("option %s: its value must be in double quotes", name)
		}
		switch name {
		case "namespaces":
			e.Namespaces, err = value, checkPatterns(value)
		case "valid-after":
			e.ValidAfter, err = parseStamp(value)
		case "valid-before":
			e.ValidBefore, err = parseStamp(value)
		}
		if err != nil {
			return fmt.Errorf("option %s: %w", name, err)
		}
		if rest == "" {
			break
		}
		if text = rest[1:]; rest[0] != ',' {
			return fmt.Errorf("option %s: text behind its value", name)
		}
	}
	if !e.ValidAfter.IsZero() && !e.ValidBefore.IsZero() && !e.ValidAfter.Before(e.ValidBefore) {
		return errors.New("valid-before is not after valid-after")
	}
	return nil
}

// quoted splits off a value in double quotes, in which \" is a quote.
func quoted(s string) (value, rest string, err error) {
	if s == "" || s[0] != '"' {
		return "", "", errors.New("no quote")
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s) && s[i+1] == '"':
			i++
			b.WriteByte('"')
		case s[i] == '"':
			return b.String(), s[i+1:], nil
		default:
			b.WriteByte(s[i])
		}
	}
	return "", "", errors.New("no closing quote")
}

// cutOptions splits at the first blank that is not within quotes.
func cutOptions(s string) (opts, rest string, err error) {
	in := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && i+1 < len(s) && s[i+1] == '"':
			i++
		case c == '"':
			in = !in
		case !in && (c == ' ' || c == '\t'):
			return s[:i], strings.TrimLeft(s[i:], " \t"), nil
		}
	}
	if in {
		return "", "", errors.New("options: no closing quote")
	}
	return "", "", fmt.Errorf("no key behind %q", s)
}

// cutField splits off what stands before the first blanks.
func cutField(s string) (field, rest string, found bool) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, "", false
	}
	return s[:i], strings.Trim(s[i:], " \t"), true
}

func isKeyType(s string) bool {
	return strings.HasPrefix(s, "ssh-") || strings.HasPrefix(s, "ecdsa-") || strings.HasPrefix(s, "sk-")
}

// parseSSHKey reads a key of any kind that SSH has, in the one form in which
// ssh-keygen writes it.
func parseSSHKey(kind, text string) (ssh.PublicKey, error) {
	if !isKeyType(kind) {
		return nil, fmt.Errorf("%w: %q is not a kind of SSH key", ErrMalformed, kind)
	}
	blob, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s key: %w", ErrMalformed, kind, err)
	}
	key, err := ssh.ParsePublicKey(blob)
	if err != nil {
		return nil, fmt.Errorf("%w: %s key: %w", ErrMalformed, kind, err)
	}
	if key.Type() != kind || SSHKeyLine(key) != kind+" "+text {
		return nil, fmt.Errorf("%w: %s key: not in the form in which ssh-keygen writes it", ErrMalformed, kind)
	}
	return key, nil
}

// parseStamp reads YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with Z in UTC.
func parseStamp(s string) (time.Time, error) {
	zone := time.Local
	digits := s
	if n := len(s); n > 0 && (s[n-1] == 'Z' || s[n-1] == 'z') {
		zone, digits = time.UTC, s[:n-1]
	}
	for _, layout := range []string{"20060102", "200601021504", "20060102150405"} {
		if len(layout) == len(digits) {
			t, err := time.ParseInLocation(layout, digits, zone)
			if err == nil && t.Unix() > 0 {
				return t, nil
			}
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time as in 20260101 or 20260101123000Z", s)
}

func rsaBits(key ssh.PublicKey) int {
	if c, ok := key.(ssh.CryptoPublicKey); ok {
		if r, ok := c.CryptoPublicKey().(*rsa.PublicKey); ok {
			return r.N.BitLen()
		}
	}
	return 0
}
