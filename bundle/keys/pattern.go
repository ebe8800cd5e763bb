package keys

import (
	"errors"
	"strings"
)

// maxPattern is the length in bytes from which on ssh(1) takes no pattern.
const maxPattern = 1023

// checkPatterns refuses lists that ssh-keygen would not follow to the end.
func checkPatterns(list string) error {
	for p := range strings.SplitSeq(list, ",") {
		switch p = strings.TrimPrefix(p, "!"); {
		case p == "":
			return errors.New("an empty pattern")
		case len(p) >= maxPattern:
			return errors.New("a pattern of more than 1022 bytes")
		}
	}
	return nil
}

// matchList says whether s matches a pattern of list and none that forbids,
// as PATTERNS in ssh_config(5) has it. A list that only forbids allows nothing.
func matchList(s, list string) bool {
	got := false
	for p := range strings.SplitSeq(list, ",") {
		if forbid, no := strings.CutPrefix(p, "!"); no {
			if matchPattern(s, forbid) {
				return false
			}
		} else if matchPattern(s, p) {
			got = true
		}
	}
	return got
}

// matchPattern matches bytes: * is any number of them, ? is one. Going back to
// the last * only keeps the time at len(s) × len(p).
func matchPattern(s, p string) bool {
	i, j := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case j < len(p) && p[j] == '*':
			star, mark = j, i
			j++
		case j < len(p) && (p[j] == '?' || p[j] == s[i]):
			i++
			j++
		case star >= 0:
			mark++
			i, j = mark, star+1
		default:
			return false
		}
	}
	for j < len(p) && p[j] == '*' {
		j++
	}
	return j == len(p)
}
