package cache

import (
	"strconv"
	"strings"
)

// byteRange reads a Range header as RFC 9110 §14 has it, for an object of size
// bytes. whole: there is none, or one that is to be passed over: not of bytes,
// malformed, or several. If not whole, length 0 says that no byte is within the
// object.
func byteRange(header string, size int64) (off, length int64, whole bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return 0, size, true
	}
	from, to, ok := strings.Cut(strings.Trim(spec, " \t"), "-")
	if !ok || strings.Contains(spec, ",") {
		return 0, size, true
	}
	first, okFirst := digits(from)
	last, okLast := digits(to)
	switch {
	case from == "" && okLast: // the last bytes
		n := min(last, size)
		return size - n, n, false
	case okFirst && to == "":
		last = size - 1
	case !okFirst || !okLast || last < first:
		return 0, size, true
	}
	if first >= size {
		return 0, 0, false
	}
	return first, min(last, size-1) - first + 1, false
}

// digits reads a number without a sign; one that is too large for any object is
// the largest there is.
func digits(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 1<<63 - 1, true
	}
	return n, true
}
