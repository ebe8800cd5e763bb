package ec2api

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

// A pagination token is where the page before ended and a code that makes it
// good for this caller, action and question alone. Nothing is kept for it.

const (
	tokenSum  = 16 // bytes of the code
	maxToken  = 2048
	maxResult = 1000
)

// paging are the parameters of actions that give their results in pages.
type paging struct {
	MaxResults *int64
	NextToken  string
}

func (g *paging) check() error {
	if g.MaxResults != nil && (*g.MaxResults < 1 || *g.MaxResults > maxResult) {
		return refuse(catalog.CodeParameterValue, "value (%d) for parameter MaxResults is invalid: it must be 1 to %d", *g.MaxResults, maxResult)
	}
	return nil
}

// question is what a token is good for: the parameters but for those of paging.
func (c *call) question() string {
	names := make([]string, 0, len(c.params.values))
	for n := range c.params.values {
		if n != "NextToken" && n != "MaxResults" && n != "DryRun" && !strings.HasPrefix(n, "X-Amz-") && n != "Version" {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	var b strings.Builder
	for _, n := range names {
		v := c.params.values[n]
		fmt.Fprintf(&b, "%d:%s,%d:%s,", len(n), n, len(v), v)
	}
	return b.String()
}

func (c *call) token(last string) string {
	sum := c.tokenSum(last)
	return base64.RawURLEncoding.EncodeToString(append(sum, last...))
}

func (c *call) tokenSum(last string) []byte {
	h := hmac.New(sha256.New, c.accounts.secret[:])
	for _, s := range []string{c.account.id, c.question(), last} {
		fmt.Fprintf(h, "%d:%s,", len(s), s)
	}
	return h.Sum(nil)[:tokenSum]
}

// after is where a token says that the page before ended; "" without one.
func (c *call) after(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	bad := refuse(codeInvalidToken, "the NextToken is not one that was given out for this request")
	if len(token) > maxToken {
		return "", bad
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) < tokenSum || !hmac.Equal(b[:tokenSum], c.tokenSum(string(b[tokenSum:]))) {
		return "", bad
	}
	return string(b[tokenSum:]), nil
}

// page cuts what a request asks for out of results, which are in the order of
// their ids, and gives the token for the next page.
func page[T any](c *call, g *paging, results []T, id func(T) string) ([]T, string, error) {
	if err := g.check(); err != nil {
		return nil, "", err
	}
	last, err := c.after(g.NextToken)
	if err != nil {
		return nil, "", err
	}
	from := 0
	for from < len(results) && last != "" && id(results[from]) <= last {
		from++
	}
	results = results[from:]
	if g.MaxResults == nil || int64(len(results)) <= *g.MaxResults {
		return results, "", nil
	}
	results = results[:*g.MaxResults]
	return results, c.token(id(results[len(results)-1])), nil
}
