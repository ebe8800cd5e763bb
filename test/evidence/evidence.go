// Package evidence says how much a test tries: little in every run, much in the
// long campaigns of "make evidence".
//
// What goes in: the environment, where that command sets INSTAR_EVIDENCE. What
// comes out: whether it is set, and numbers of cases. It touches nothing.
package evidence

import (
	"os"
	"strconv"
	"testing"
)

// Wanted reports whether this is a run of the campaigns.
func Wanted() bool { return os.Getenv("INSTAR_EVIDENCE") != "" }

// Cases is a number of cases: always, or many in the campaigns.
func Cases(always, many int) int {
	if Wanted() {
		return many
	}
	return always
}

// CasesIn is [Cases], or what the environment's variable says if it is set.
func CasesIn(t testing.TB, variable string, always, many int) int {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return Cases(always, many)
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("$%s: %v", variable, err)
	}
	return n
}
