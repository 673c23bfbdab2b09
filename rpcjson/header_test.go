package rpcjson

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseHeader(t *testing.T) {
	for _, c := range []struct {
		frame string
		want  Header
	}{
		{`{"src":"mos","id":7,"method":"A","params":{"id":1}}`, Header{ID: "7", Src: "mos", Method: "A"}},
		{`{"id":"x","src":"d","dst":"m","result":null}`, Header{ID: "x", Src: "d", Dst: "m", Reply: true}},
		{`{"id":1,"error":{"code":-1}}`, Header{ID: "1", Reply: true}},
		{`{"method":"A"}`, Header{Method: "A"}},
	} {
		h, err := ParseHeader([]byte(c.frame))
		require.NoError(t, err)
		require.Equal(t, c.want, h)
	}
	for _, f := range []string{"", "{}", "[]", "x", `{"id":null,"method":"A"}`, `{"src":"a"}`} {
		_, err := ParseHeader([]byte(f))
		require.ErrorIs(t, err, ErrInvalidFrame, "%s", f)
	}
}

func TestRefuseFrame(t *testing.T) {
	s := newTest(t, newFake(), nil)
	require.Equal(t, "esp32_123456", s.ID())
	require.Equal(t, DefaultMaxFrame, s.MaxFrame())
	require.Equal(t, `{"id":1,"src":"esp32_123456","dst":"m","error":{"code":429,"message":"Request queue overflow"}}`,
		string(s.RefuseFrame([]byte(`{"src":"m","id":1,"method":"A"}`), Overflow())))
	for _, f := range []string{"", `{"id":1}`, `{"method":"A"}`, `{"id":1,"dst":"other","method":"A"}`} {
		require.Nil(t, s.RefuseFrame([]byte(f), Overflow()), "%s", f)
	}
}
