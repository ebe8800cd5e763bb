package web

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

// perPage is how many images a page of results has.
const perPage = 50

// searchPage is what is asked for and what was found.
type searchPage struct {
	Words        string
	Architecture string
	Platform     string
	Deprecated   bool

	Architectures []string
	Total         int
	From, To      int
	Results       []result
	Previous      string // URL, "" for none
	Next          string
}

type result struct {
	*catalog.Image
	Owner      string // alias or id
	Deprecated bool
	Shown      string // name, or id if it has none
}

// maxWords is how many bytes of a search are looked at.
const maxWords = 256

func (s *site) search(ctx context.Context, r *http.Request) (string, any, error) {
	q := r.URL.Query()
	p := &searchPage{
		Words: strings.ToValidUTF8(q.Get("q"), ""), Architecture: q.Get("architecture"), Platform: q.Get("platform"), Deprecated: q.Get("deprecated") != "",
		Architectures: []string{"x86_64", "arm64", "i386"},
	}
	p.Words = p.Words[:min(len(p.Words), maxWords)]
	words := strings.Fields(strings.ToLower(p.Words))
	var found []result
	err := s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		found = nil
		names, err := aliases(ctx, v)
		if err != nil {
			return err
		}
		if err := v.Load(ctx); err != nil {
			return err
		}
		for m, err := range v.Images(ctx) {
			if err != nil {
				return err
			}
			if !s.visible(m) || p.Architecture != "" && m.Architecture != p.Architecture || !platformIs(m, p.Platform) {
				continue
			}
			res := s.result(m, names)
			if res.Deprecated && !p.Deprecated && m.Owner != s.o.Account || !s.has(m, names[m.Owner], words) {
				continue
			}
			found = append(found, res)
		}
		return nil
	})
	if err != nil {
		return "", nil, err
	}
	slices.SortStableFunc(found, func(a, b result) int { return b.Created.Compare(a.Created) })
	page, err := strconv.Atoi(q.Get("page"))
	last := max(1, (len(found)+perPage-1)/perPage)
	if err != nil || page < 1 || page > last {
		page = 1
	}
	p.Total = len(found)
	p.From, p.To = (page-1)*perPage, min(page*perPage, len(found))
	p.Results = found[p.From:p.To]
	if page > 1 {
		p.Previous = pageURL(q, page-1)
	}
	if page < last {
		p.Next = pageURL(q, page+1)
	}
	return "search", p, nil
}

func pageURL(q url.Values, n int) string {
	out := url.Values{}
	for _, name := range []string{"q", "architecture", "platform", "deprecated"} {
		if v := q.Get(name); v != "" {
			out.Set(name, v)
		}
	}
	out.Set("page", strconv.Itoa(n))
	return "/?" + out.Encode()
}

func (s *site) result(m *catalog.Image, names map[string]string) result {
	res := result{Image: m, Owner: m.Owner, Deprecated: m.IsDeprecated(s.o.Now()), Shown: m.Name}
	if a := names[m.Owner]; a != "" {
		res.Owner = a
	}
	if res.Shown == "" {
		res.Shown = m.ID
	}
	return res
}

// visible says whether the page shows an image at all.
func (s *site) visible(m *catalog.Image) bool {
	if s.o.Account == "" {
		return m.State == catalog.Available && m.Public
	}
	return m.Visible(s.o.Account)
}

func platformIs(m *catalog.Image, want string) bool {
	switch want {
	case "windows":
		return m.Platform == "windows"
	case "linux":
		return m.Platform != "windows"
	}
	return true
}

// has says whether an image has all of the words, in lower case, anywhere in
// what the viewer may see of it.
func (s *site) has(m *catalog.Image, alias string, words []string) bool {
	if len(words) == 0 {
		return true
	}
	text := []string{m.ID, m.Name, m.Description, m.Owner, alias, m.Architecture, m.PlatformDetails}
	if m.Owner == s.o.Account {
		for k, v := range m.Tags {
			text = append(text, k, v)
		}
	}
	all := strings.ToLower(strings.Join(text, "\n"))
	return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(all, w) })
}

func aliases(ctx context.Context, v *catalog.View) (map[string]string, error) {
	out := make(map[string]string)
	for a, err := range v.Accounts(ctx) {
		if err != nil {
			return nil, err
		}
		out[a.ID] = a.Alias
	}
	return out, nil
}
