package evidence_test

import (
	"testing"

	"github.com/instar-image/instar/test/evidence"
)

func TestCases(t *testing.T) {
	for _, c := range []struct {
		campaign, number string
		wanted           bool
		cases, casesIn   int
	}{
		{"", "", false, 3, 3},
		{"1", "", true, 30, 30},
		{"", "7", false, 3, 7},
		{"1", "7", true, 30, 7},
	} {
		t.Setenv("INSTAR_EVIDENCE", c.campaign)
		t.Setenv("INSTAR_NUMBER_OF_CASES", c.number)
		if wanted, n, in := evidence.Wanted(), evidence.Cases(3, 30), evidence.CasesIn(t, "INSTAR_NUMBER_OF_CASES", 3, 30); wanted != c.wanted || n != c.cases || in != c.casesIn {
			t.Errorf("%+v: wanted %v, %d cases, %d", c, wanted, n, in)
		}
	}
}
