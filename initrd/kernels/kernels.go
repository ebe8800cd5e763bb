// Package kernels orders the releases of kernels, as uname -r and the names of
// their files have them. It touches nothing.
package kernels

import "strings"

// CompareReleases orders two releases, as cmp.Compare does: numbers by value, all else
// by its bytes, what ends before what goes on, as 6.1.0-9 before 6.1.0-18; and
// what begins with "~", Debian's sign for what goes before nothing, before that:
// 6.12~rc1 before 6.12.
func CompareReleases(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
			if c := strings.Compare(x, y); c != 0 {
				return c
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			if a[0] == '~' {
				return -1
			}
			if b[0] == '~' {
				return 1
			}
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	switch {
	case strings.HasPrefix(a, "~"):
		return -1
	case strings.HasPrefix(b, "~"):
		return 1
	}
	return len(a) - len(b)
}

// digits is the length of the number that s begins with.
func digits(s string) int {
	return len(s) - len(strings.TrimLeft(s, "0123456789"))
}
