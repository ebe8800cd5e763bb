package ec2api

import (
	"encoding/base64"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/upload/catalog"
)

// maxList is how many members a list may have.
const maxList = 1000

// blob is a value in base64.
type blob []byte

var (
	timeType = reflect.TypeFor[time.Time]()
	blobType = reflect.TypeFor[blob]()
)

// decode fills the struct that in points to with the parameters. A field's
// parameter has its name, or that in its tag `q:"Name"`; "!" behind it says that
// it must be there. Fields are string, *string (whose absence differs from
// emptiness), bool, *bool, int64, *int64, time.Time, blob, structs and slices of
// these: lists are flattened and their numbers begin at 1, with gaps allowed.
func (p *params) decode(in any) error {
	v := reflect.ValueOf(in).Elem()
	if err := p.members(v, ""); err != nil {
		return err
	}
	return p.unknown()
}

func (p *params) members(v reflect.Value, prefix string) error {
	t := v.Type()
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			if err := p.members(v.Field(i), prefix); err != nil {
				return err
			}
			continue
		}
		name, must := strings.CutSuffix(f.Tag.Get("q"), "!")
		if name == "" {
			name = f.Name
		}
		there, err := p.value(v.Field(i), prefix+name)
		if err != nil {
			return err
		}
		if must && !there {
			return missing(prefix + name)
		}
	}
	return nil
}

// value sets v from the parameter called name, or those below it, and says
// whether there was any.
func (p *params) value(v reflect.Value, name string) (bool, error) {
	switch {
	case v.Kind() == reflect.Slice && v.Type() != blobType:
		return p.list(v, name)
	case v.Kind() == reflect.Struct && v.Type() != timeType:
		if !p.below(name) {
			return false, nil
		}
		return true, p.members(v, name+".")
	case v.Kind() == reflect.Pointer && v.Type().Elem().Kind() == reflect.Struct && v.Type().Elem() != timeType:
		if !p.below(name) {
			return false, nil
		}
		v.Set(reflect.New(v.Type().Elem()))
		return true, p.members(v.Elem(), name+".")
	}
	s, ok := p.get(name)
	if !ok {
		return false, nil
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if err := scalar(v, s); err != nil {
		return true, refuse(catalog.CodeParameterValue, "value (%.100s) for parameter %s is invalid: %v", s, name, err)
	}
	return true, nil
}

// below says whether there are parameters under a name.
func (p *params) below(name string) bool {
	for n := range p.values {
		if strings.HasPrefix(n, name+".") {
			return true
		}
	}
	return false
}

// list sets a slice from NAME.1, NAME.2 and so on.
func (p *params) list(v reflect.Value, name string) (bool, error) {
	numbers := map[int]bool{}
	for n := range p.values {
		rest, ok := strings.CutPrefix(n, name+".")
		if !ok {
			continue
		}
		digits, _, _ := strings.Cut(rest, ".")
		i, err := strconv.Atoi(digits)
		if err != nil || i < 1 || len(digits) > 9 || digits[0] == '0' || digits[0] == '+' {
			continue // stays unknown
		}
		numbers[i] = true
	}
	if len(numbers) > maxList {
		return true, refuse(catalog.CodeParameterValue, "%s has more than %d members", name, maxList)
	}
	order := make([]int, 0, len(numbers))
	for i := range numbers {
		order = append(order, i)
	}
	slices.Sort(order)
	for _, i := range order {
		item := reflect.New(v.Type().Elem()).Elem()
		if _, err := p.value(item, name+"."+strconv.Itoa(i)); err != nil {
			return true, err
		}
		v.Set(reflect.Append(v, item))
	}
	return len(order) > 0, nil
}

func scalar(v reflect.Value, s string) error {
	switch v.Type() {
	case timeType:
		at, err := parseTime(s)
		if err != nil {
			return err
		}
		v.Set(reflect.ValueOf(at))
		return nil
	case blobType:
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			return fmt.Errorf("it is not base64")
		}
		v.SetBytes(b)
		return nil
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(s)
	case reflect.Bool:
		switch s {
		case "true", "True", "1":
			v.SetBool(true)
		case "false", "False", "0":
			v.SetBool(false)
		default:
			return fmt.Errorf("it is neither true nor false")
		}
	case reflect.Int64:
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return fmt.Errorf("it is not a whole number")
		}
		v.SetInt(n)
	default:
		panic("ec2api: a request has a field of type " + v.Type().String())
	}
	return nil
}

// parseTime reads a time as EC2's clients write it.
func parseTime(s string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05.999Z", "2006-01-02T15:04Z", "2006-01-02"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("it is not a time such as 2027-01-15T08:00:00Z")
}
