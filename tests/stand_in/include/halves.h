/* float16 and bfloat16, and pairs of them, as far as the kernels of CubeCL use them. Every operation rounds. */
#pragma once

template <typename Bits> struct Half {
    unsigned short bits;

    Half() = default;
    Half(float x) : bits(Bits::of(x)) {}
    Half(double x) : Half((float)x) {}
    template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>> Half(I x) : Half((float)x) {}
    template <typename Other> explicit Half(Half<Other> x) : Half((float)x) {}
    operator float() const { return Bits::value(bits); }
};

struct Float16 {
    static unsigned short of(float x) { _Float16 half = (_Float16)x; unsigned short b; std::memcpy(&b, &half, 2); return b; }
    static float value(unsigned short b) { _Float16 half; std::memcpy(&half, &b, 2); return (float)half; }
};

struct Bfloat16 {
    static unsigned short of(float x) {
        unsigned bits;
        std::memcpy(&bits, &x, 4);
        return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    static float value(unsigned short b) {
        unsigned bits = (unsigned)b << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

using __half = Half<Float16>;
using __nv_bfloat16 = Half<Bfloat16>;

template <typename B> Half<B> operator+(Half<B> a, Half<B> b) { return (float)a + (float)b; }
template <typename B> Half<B> operator-(Half<B> a, Half<B> b) { return (float)a - (float)b; }
template <typename B> Half<B> operator*(Half<B> a, Half<B> b) { return (float)a * (float)b; }
template <typename B> Half<B> operator/(Half<B> a, Half<B> b) { return (float)a / (float)b; }
template <typename B> Half<B> operator-(Half<B> a) { return -(float)a; }
template <typename B> Half<B> __hfma(Half<B> a, Half<B> b, Half<B> c) { return fmaf(a, b, c); }
template <typename B> Half<B> __hmin(Half<B> a, Half<B> b) { return fminf(a, b); }
template <typename B> Half<B> __hmax(Half<B> a, Half<B> b) { return fmaxf(a, b); }
template <typename B> Half<B> __habs(Half<B> a) { return fabsf(a); }
template <typename B> Half<B> hexp(Half<B> a) { return expf(a); }
template <typename B> Half<B> hlog(Half<B> a) { return logf(a); }
template <typename B> Half<B> hsqrt(Half<B> a) { return sqrtf(a); }
template <typename B> Half<B> hrsqrt(Half<B> a) { return 1.0f / sqrtf(a); }
template <typename B> Half<B> hrcp(Half<B> a) { return 1.0f / (float)a; }
template <typename B> Half<B> htanh(Half<B> a) { return tanhf(a); }
template <typename B> bool __hisnan(Half<B> a) { return std::isnan((float)a); }

template <typename B> struct Pair {
    Half<B> x, y;
    Pair() = default;
    Pair(Half<B> x, Half<B> y) : x(x), y(y) {}
    explicit Pair(Half<B> both) : x(both), y(both) {}
};
using __half2 = Pair<Float16>;
using __nv_bfloat162 = Pair<Bfloat16>;

template <typename B> Pair<B> operator+(Pair<B> a, Pair<B> b) { return {a.x + b.x, a.y + b.y}; }
template <typename B> Pair<B> operator-(Pair<B> a, Pair<B> b) { return {a.x - b.x, a.y - b.y}; }
template <typename B> Pair<B> operator*(Pair<B> a, Pair<B> b) { return {a.x * b.x, a.y * b.y}; }
template <typename B> Pair<B> operator/(Pair<B> a, Pair<B> b) { return {a.x / b.x, a.y / b.y}; }
template <typename B> Pair<B> operator-(Pair<B> a) { return {-a.x, -a.y}; }
template <typename B> Pair<B> __hfma2(Pair<B> a, Pair<B> b, Pair<B> c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
template <typename B> Pair<B> __hmin2(Pair<B> a, Pair<B> b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
template <typename B> Pair<B> __hmax2(Pair<B> a, Pair<B> b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
