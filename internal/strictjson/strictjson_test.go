package strictjson_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/slotota/ota/internal/strictjson"
	"github.com/stretchr/testify/require"
)

func TestCheck(t *testing.T) {
	members := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `"%d":0,`, i)
		}
		return "{" + strings.TrimSuffix(b.String(), ",") + "}"
	}
	for _, text := range []string{
		`null`, ` 1 `, `"x"`, `[]`, `{}`, `{"":""}`, `[1.5e-3,-0,true,[false]]`, `{"a":{"a":{"a":1}}}`,
		`"\ud83d\ude00"`, `"\\ud800"`, `"\\\\\u00e9"`, `"\"{[{[{[{[{[{[{[{[{[{["`, "\"\u00fc\ufffd\"",
		strings.Repeat("[", 16) + strings.Repeat("]", 16), members(strictjson.MaxMembers),
	} {
		require.NoError(t, strictjson.Check([]byte(text)), text)
		require.True(t, json.Valid([]byte(text)))
	}
	for text, off := range map[string]int64{
		``: 0, ` `: 1, `{`: 1, `[1,]`: 4, `{"a":1,}`: 8, `{a:1}`: 2, `{'a':1}`: 2, `01`: 2, `+1`: 1, `.5`: 1, `1.`: 2, `NaN`: 1,
		`[1]x`: 4, `1 2`: 3, `{}{}`: 3, "\"\x00\"": 2, "\"\t\"": 2, `"\x"`: 3, "\ufeff1": 1, "1\x00": 2, `// x`: 1,
		"\"\xff\"": 1, "\"\xc0\x80\"": 1, "\"\xed\xa0\x80\"": 1, "[1,\xfe]": 3,
		`"\ud800"`: 1, `"\udc00"`: 1, `"x\ud800x"`: 2, `"\ud800\ud800\udc00"`: 1, `"\udc00\ud800"`: 1, `{"\uD800":1}`: 2, `"\\\ud800"`: 3,
		`{"a":1,"a":1}`: 10, `{"a":1,"A":1}`: 10, `{"a":1,"\u0061":1}`: 15, `{"s":1,"ſ":1}`: 11, "{\"k\":1,\"\u212a\":1}": 12,
		`[{"x":{"a":1,"b":2,"a":3}}]`:                     22,
		strings.Repeat("[", 17) + strings.Repeat("]", 17): 16,
	} {
		err := strictjson.Check([]byte(text))
		var e *strictjson.Error
		require.ErrorAs(t, err, &e, text)
		require.Equal(t, off, e.Off, "%q: %v", text, err)
	}
	require.ErrorContains(t, strictjson.Check([]byte(members(strictjson.MaxMembers+1))), "too many members")
}

func TestValues(t *testing.T) {
	ms, err := strictjson.Members([]byte(` { "b" : [ 1 , 2 ] , "a":"x","c":{} } `))
	require.NoError(t, err)
	require.Equal(t, []strictjson.Member{
		{Name: "b", Value: []byte("[ 1 , 2 ]")}, {Name: "a", Value: []byte(`"x"`)}, {Name: "c", Value: []byte("{}")},
	}, ms)
	for _, text := range []string{``, `[]`, `1`, `null`, `"{}"`} {
		_, err := strictjson.Members([]byte(text))
		require.Error(t, err, text)
	}

	s, err := strictjson.String([]byte(`"\u00e9\n"`))
	require.NoError(t, err)
	require.Equal(t, "é\n", s)
	for text, want := range map[string]uint64{`0`: 0, `255`: 255, `18446744073709551615`: 1<<64 - 1} {
		v, err := strictjson.Uint([]byte(text), want)
		require.NoError(t, err)
		require.Equal(t, want, v)
		if want > 0 {
			_, err = strictjson.Uint([]byte(text), want-1)
			require.Error(t, err)
		}
	}
	for _, text := range []string{`-1`, `-0`, `1.0`, `1e2`, `"1"`, `null`, `18446744073709551616`, ``, `true`} {
		_, err := strictjson.Uint([]byte(text), 1<<64-1)
		require.Error(t, err, text)
	}
	for text, want := range map[string]bool{`true`: true, `false`: false} {
		v, err := strictjson.Bool([]byte(text))
		require.NoError(t, err)
		require.Equal(t, want, v)
	}
	for _, text := range []string{`null`, `0`, `"true"`, `True`, ``} {
		_, err := strictjson.Bool([]byte(text))
		require.Error(t, err, text)
		_, err = strictjson.String([]byte(strings.Trim(text, `"`)))
		require.Error(t, err, text)
	}
}

func TestFold(t *testing.T) {
	for _, s := range []string{"k", "K", "\u212a", "s", "S", "ſ", "é", "É", "ß", "ẞ", "σ", "ς", "Σ", "1", ""} {
		for _, o := range []string{"k", "K", "\u212a", "s", "S", "ſ", "é", "É", "ß", "ẞ", "σ", "ς", "Σ", "1", ""} {
			require.Equal(t, strings.EqualFold(s, o), strictjson.Fold(s) == strictjson.Fold(o), "%q, %q", s, o)
		}
	}
}
