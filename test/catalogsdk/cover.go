package main

import (
	"maps"
	"reflect"
	"slices"
	"time"
)

// cover notes the parameters that a call has.
func (d *driver) cover(action string, in any) {
	if d.covered[action] == nil {
		d.covered[action] = map[string]bool{}
		leaves(reflect.TypeOf(in).Elem(), "", func(path string) { d.covered[action][path] = false })
	}
	sent(reflect.ValueOf(in).Elem(), "", func(path string) { d.covered[action][path] = true })
}

// uncovered says which parameters the SDK has and no call had.
func (d *driver) uncovered() {
	for _, action := range slices.Sorted(maps.Keys(d.covered)) {
		for _, path := range slices.Sorted(maps.Keys(d.covered[action])) {
			if !d.covered[action][path] {
				d.fault("%s: no call had %s", action, path)
			}
		}
	}
}

func below(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// leaves are the paths of all parameters of a type.
func leaves(t reflect.Type, path string, yield func(string)) {
	switch {
	case t.Kind() == reflect.Pointer:
		leaves(t.Elem(), path, yield)
	case t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8:
		leaves(t.Elem(), path+"[]", yield)
	case t.Kind() == reflect.Struct && t != reflect.TypeFor[time.Time]():
		for i := range t.NumField() {
			if f := t.Field(i); f.IsExported() {
				leaves(f.Type, below(path, f.Name), yield)
			}
		}
	default:
		yield(path)
	}
}

// sent are the paths of the parameters that a value sets.
func sent(v reflect.Value, path string, yield func(string)) {
	t := v.Type()
	switch {
	case t.Kind() == reflect.Pointer:
		if v.IsNil() {
			return
		}
		if t.Elem().Kind() != reflect.Struct || t.Elem() == reflect.TypeFor[time.Time]() {
			yield(path) // also if it points to zero
			return
		}
		sent(v.Elem(), path, yield)
	case t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8:
		for i := range v.Len() {
			sent(v.Index(i), path+"[]", yield)
		}
	case t.Kind() == reflect.Struct && t != reflect.TypeFor[time.Time]():
		for i := range t.NumField() {
			if f := t.Field(i); f.IsExported() {
				sent(v.Field(i), below(path, f.Name), yield)
			}
		}
	case !v.IsZero():
		yield(path)
	}
}
