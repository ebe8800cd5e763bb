package chunked

import (
	"encoding/hex"
	"fmt"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxNumber is the largest number in a document: every JSON reader takes it
// exactly.
const maxNumber = 1<<53 - 1

// MarshalText gives what String gives.
func (n Name) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText reads what MarshalText gives and nothing else.
func (n *Name) UnmarshalText(b []byte) (err error) {
	*n, err = ParseName(string(b))
	return err
}

// MarshalText gives what String gives.
func (l Label) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads what MarshalText gives and nothing else.
func (l *Label) UnmarshalText(b []byte) error {
	v, err := hex.DecodeString(string(b))
	if err != nil || copy(l[:], v) != len(l) || string(b) != l.String() {
		return fmt.Errorf("%w: domain label %q is not 24 hex digits", ErrFormat, clip(string(b)))
	}
	return nil
}

// Stamp is t as documents have it: UTC, whole seconds.
func Stamp(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

// wrong is the error of a check. Whoever knows the document names it.
func wrong(format string, a ...any) error { return bad(ErrFormat, "", format, a...) }

// checkText is for what people read: no character moves the cursor, ends the
// line or turns the direction of writing.
func checkText(what, s string, least, most int) error {
	if len(s) < least || len(s) > most {
		return wrong("%s has %d bytes, not %d to %d", what, len(s), least, most)
	}
	if !utf8.ValidString(s) {
		return wrong("%s is not UTF-8", what)
	}
	for _, r := range s {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069' {
			return wrong("%s holds the control character %U", what, r)
		}
	}
	return nil
}

func checkNumber(what string, n, least, most int64) error {
	if n < least || n > most {
		return wrong("%s is %d, not %d to %d", what, n, least, most)
	}
	return nil
}

func checkTime(what string, t time.Time) error {
	if t.Unix() < 1 || t.UTC().Year() > 9999 || t.Nanosecond() != 0 {
		return wrong("%s is not a time in whole seconds after 1970", what)
	}
	return nil
}

// checkSizes is for lists of objects, which ascend by name.
func checkSizes(what string, list []ObjectSize, least, most int64) error {
	for i, o := range list {
		if i > 0 && o.Name.Compare(list[i-1].Name) <= 0 {
			return wrong("%s do not ascend at %s", what, o.Name)
		}
		if o.Size < least || o.Size > most {
			return wrong("%s: %s has %d bytes, not %d to %d", what, o.Name, o.Size, least, most)
		}
	}
	return nil
}

func isHex(s string, size int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == size && hex.EncodeToString(b) == s
}
