package crashtest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
)

// The words of faults in a replay text.
var (
	kinds = []string{memflash.CutBefore: "before", memflash.CutPrefix: "prefix", memflash.CutBits: "bits",
		memflash.CutWeak: "weak", memflash.CutAfter: "after", memflash.Skip: "skip", memflash.Fail: "fail",
		memflash.Misdirect: "misdirect", memflash.Flip: "flip", memflash.Slow: "slow"}
	losses = []string{memflash.LoseNone: "none", memflash.LoseSome: "some", memflash.LoseAll: "all"}
	ops    = []string{"write", "erase", "sync", "read"} // bits of memflash.OpKind
)

const noFaults = "none"

// FormatReplay returns the text that stands for a run of a scenario with faults:
// the name, a slash, and the faults with commas between them, each
//
//	at:kind[+loss][+on=ops][+n=N][+in=flash.off.len][+delay=duration][+forever][:seed]
//
// where kind is before, prefix, bits, weak, after, skip, fail, misdirect, flip or
// slow, loss is some or all, and ops are joined by |. Without faults it is
// name/none.
func FormatReplay(scenario string, faults []memflash.Fault) string {
	if len(faults) == 0 {
		return scenario + "/" + noFaults
	}
	var fs []string
	for _, f := range faults {
		var b strings.Builder
		fmt.Fprintf(&b, "%d:%s", f.At, word(kinds, int(f.Kind)))
		if f.Loss != memflash.LoseNone {
			b.WriteString("+" + word(losses, int(f.Loss)))
		}
		if f.On != 0 {
			b.WriteString("+on=" + f.On.String())
		}
		if f.N != 0 {
			fmt.Fprintf(&b, "+n=%d", f.N)
		}
		if f.Len != 0 {
			fmt.Fprintf(&b, "+in=%d.%d.%d", f.Flash, f.Off, f.Len)
		}
		if f.Delay != 0 {
			fmt.Fprintf(&b, "+delay=%v", f.Delay)
		}
		if f.Forever {
			b.WriteString("+forever")
		}
		if f.Seed != 0 {
			fmt.Fprintf(&b, ":%d", f.Seed)
		}
		fs = append(fs, b.String())
	}
	return scenario + "/" + strings.Join(fs, ",")
}

func word(words []string, i int) string {
	if i < len(words) {
		return words[i]
	}
	return strconv.Itoa(i)
}

// ParseReplay is the inverse of [FormatReplay]. The error wraps ota.ErrInvalid.
func ParseReplay(s string) (scenario string, faults []memflash.Fault, err error) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", nil, fmt.Errorf("crashtest: replay %s: need scenario/faults: %w", ota.Quote(s), ota.ErrInvalid)
	}
	scenario, rest := s[:i], s[i+1:]
	if rest == noFaults {
		return scenario, nil, nil
	}
	for text := range strings.SplitSeq(rest, ",") {
		f, err := parseFault(text)
		if err != nil {
			return "", nil, fmt.Errorf("crashtest: replay: fault %s: %w: %w", ota.Quote(text), err, ota.ErrInvalid)
		}
		faults = append(faults, f)
	}
	return scenario, faults, nil
}

func parseFault(s string) (f memflash.Fault, err error) {
	at, rest, _ := strings.Cut(s, ":")
	rest, seed, seeded := strings.Cut(rest, ":")
	if f.At, err = strconv.Atoi(at); err != nil {
		return f, err
	}
	if seeded {
		if f.Seed, err = strconv.ParseUint(seed, 10, 64); err != nil {
			return f, err
		}
	}
	words := strings.Split(rest, "+")
	kind := slices.Index(kinds, words[0])
	if kind < 0 {
		return f, fmt.Errorf("unknown kind %s", ota.Quote(words[0]))
	}
	f.Kind = memflash.Kind(kind)
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		loss := slices.Index(losses, w)
		switch {
		case loss >= 0:
			f.Loss = memflash.Loss(loss)
		case w == "forever":
			f.Forever = true
		case key == "on":
			for op := range strings.SplitSeq(value, "|") {
				i := slices.Index(ops, op)
				if i < 0 {
					return f, fmt.Errorf("unknown operation %s", ota.Quote(op))
				}
				f.On |= 1 << i
			}
		case key == "n":
			f.N, err = strconv.ParseInt(value, 10, 64)
		case key == "in":
			_, err = fmt.Sscanf(value+"\n", "%d.%d.%d\n", &f.Flash, &f.Off, &f.Len)
		case key == "delay":
			f.Delay, err = time.ParseDuration(value)
		default:
			err = fmt.Errorf("unknown word %s", ota.Quote(w))
		}
		if err != nil {
			return f, err
		}
	}
	return f, nil
}
