# ruff: noqa: RUF001 - answers with unicode characters
r"""Kinds of answers that the built-in `math` reward once decided wrongly, and their wrong twins.

The tables have the form of tests/support/math_tables.py, and that of test_math_notations.py.
"""

from __future__ import annotations

import pytest
from math_tables import cases, decision

RIGHT = r"""
18 <- 18\text{ minutes and } 0 \text{ seconds} ;; 18 eggs left
21 <- twenty-one ;; twenty one
(-\infty, -2] \cup [5, \infty) <- \mathbb{R} \setminus (-2,5) ;; x \le -2 \text{ or } x \ge 5
(-2, 3) \cup (3, \infty) <- x > -2, x \neq 3 ;; x > -2 \text{ and } x \ne 3
(-2, 3) \cup (3, \infty) <- (-2, \infty) \setminus \{3\}
(0,1)\cup(1,2) <- 0<x<2, x\ne1 ;; (1,2)\cup(0,1)
(0, 0, 5) <- x = y = 0, z = 5 ;; (0,0,5)
\mathbf{i} - 2\mathbf{j} + 3\mathbf{k} <- (1,-2,3) ;; \langle 1, -2, 3 \rangle
\mathbf{i} - 2\mathbf{j} + 3\mathbf{k} <- \hat{i} - 2\hat{j} + 3\hat{k} ;; \vec{i}-2\vec{j}+3\vec{k}
\mathbf{i} - 2\mathbf{j} + 3\mathbf{k} <- \begin{pmatrix} 1 \\ -2 \\ 3 \end{pmatrix}
\begin{pmatrix} 3 \\ -4 \end{pmatrix} <- 3\mathbf{i} - 4\mathbf{j} ;; (3,-4)
3n^2 + n <- 3n^2+n \text{ for all } n ;; n(3n+1)
f(x) = x + 1 \text{ and } f(x) = -x <- f(x)=-x \text{ or } f(x)=x+1 ;; x+1, -x
f(x) = cx <- f(x) = cx \text{ for some constant } c ;; f(x)=cx, c \in \mathbb{R}
x = 4 <- x-4=0 ;; x = 4.0
\text{Saturday} <- \text{on Saturday} ;; Saturday
\text{Yes} <- \text{Yes, it is} ;; Yes, it converges ;; \text{Yes, } f \text{ is continuous}
\text{Yes} <- yes, always
\text{Infinitely many} <- \infty ;; \text{infinite} ;; \text{infinitely many solutions}
\text{all positive integers} <- \mathbb{Z}^+ ;; \mathbb{Z}_{>0} ;; \mathbb{N}
\text{Alice and Bob} <- Bob and Alice ;; Alice, Bob
\text{(D)} <- 选项D ;; D
ACD <- A、C、D ;; A C D
15 <- 15。 ;; 答：15
x\ge 2 <- x ≧ 2 ;; x⩾2
12:00 \text{ noon} <- 12:00 PM ;; noon ;; 12 noon
2023 <- \text{the year } 2023 ;; year 2023 ;; in 2023
n \equiv 1 \pmod{4} <- n = 4k+1 ;; 4k+1
\binom{20}{10} <- C_{20}^{10} ;; 184756
\frac{1}{2}\ln 3 <- \operatorname{artanh}\frac12 ;; \ln\sqrt{3}
\{-1, 0, 1\} <- \{0, \pm 1\} ;; -1,0,1
\frac{\pi}{6} + 2k\pi, k \in \mathbb{Z} <- \frac{\pi}{6} + 2\pi k
\frac{\pi}{6} + 2k\pi, k \in \mathbb{Z} <- x = \frac{\pi}{6}+2k\pi \ (k\in\mathbb{Z})
f(x) = 2x + 1 <- f(t) = 2t+1 ;; f(n) = 2n+1
3.5 <- 3 hours 30 minutes ;; 3\text{ hours and }30\text{ minutes}
210 <- 3 hours 30 minutes ;; 3 h 30 min
63 <- 5 feet 3 inches ;; 5 ft 3 in
45.5^\circ <- 45^\circ 30' ;; 45.5
f(x) = 0 \text{ and } f(x) = x <- f(x)=x \text{ or } f(x)=0 ;; f(x) \equiv 0, f(x) = x
f(x) = 0 \text{ and } f(x) = x <- f(x) = x, 0
(1, 1, 1) <- a=b=c=1 ;; x=y=z=1
x = y = z = 2 <- (2,2,2) ;; (x,y,z) = (2,2,2)
(-\infty, -3) \cup (-3, 3) \cup (3, \infty) <- \mathbb{R} \setminus \{\pm 3\} ;; x \ne \pm 3
[2, 5) \cup (5, \infty) <- x \ge 2, x \ne 5 ;; x \geq 2 \text{ and } x \neq 5
[2, 5) \cup (5, \infty) <- [2,\infty) \setminus \{5\} ;; \{x \mid x \ge 2, x \ne 5\}
(-\infty, 0) \cup (4, \infty) <- \mathbb{R} \setminus [0,4] ;; x<0 \text{ or } x>4
\mathbb{R} <- \text{the set of all real numbers} ;; (-\infty, \infty)
\frac{\pi}{3} + k\pi, k\in\mathbb{Z} <- x=\frac{\pi}{3}+k\pi\ (k\in\mathbb{Z}) ;; \frac{\pi}{3}+n\pi
x \equiv 2 \pmod{5} <- x = 5k+2 ;; 5n+2 ;; x = 5t + 2, t \in \mathbb{Z} ;; 5k-3
2\mathbf{i} + \mathbf{j} - \mathbf{k} <- (2,1,-1) ;; \langle 2,1,-1\rangle
2\mathbf{i} + \mathbf{j} - \mathbf{k} <- 2\hat{i}+\hat{j}-\hat{k}
2\mathbf{i} + \mathbf{j} - \mathbf{k} <- 2\hat{\mathbf{i}}+\hat{\mathbf{j}}-\hat{\mathbf{k}}
2\mathbf{i} + \mathbf{j} - \mathbf{k} <- \begin{pmatrix}2\\1\\-1\end{pmatrix}
2\mathbf{i} + \mathbf{j} - \mathbf{k} <- 2\vec{i}+\vec{j}-\vec{k}
\frac{1}{3}(2\mathbf{i}-\mathbf{j}+2\mathbf{k}) <- \left(\frac23,-\frac13,\frac23\right)
e^x \mathbf{i} + t\mathbf{j} <- (e^x, t) ;; \langle e^x, t\rangle
\text{red and blue} <- blue and red ;; \text{Red and Blue}
\infty <- infinity ;; \text{infinity} ;; \text{infinitely many} ;; Infinitely many solutions
-\infty <- \text{negative infinity} ;; minus infinity
12:00 \text{ a.m.} <- midnight ;; 12 midnight
seventy-five <- 75 ;; seventy-five
75 <- seventy-five ;; seventy five
p=3,q=2 \text{ or } p=2,q=3 <- (p,q)=(3,2),(2,3) ;; (3,2), (2,3)
2:3:4 <- 2 to 3 to 4 ;; 4:6:8
(3, 0), (-3, 0) <- (\pm 3, 0) ;; (-3,0) \text{ and } (3,0)
\frac{x+2}{x-3}, x \ne 3 <- \frac{x+2}{x-3} ;; \frac{x+2}{x-3}, x\neq 3
\text{Friday} <- on Friday ;; Friday
\ln(1+\sqrt{2}) <- \operatorname{arsinh} 1 ;; \sinh^{-1}(1)
(x, y) = (1, 2), (2, 1) <- x=1,y=2 \text{ and } x=2,y=1 ;; x=1, y=2; x=2, y=1
x = 0, y = 0 \text{ or } x = 3, y = 3 <- (0,0),(3,3) ;; (3,3) \text{ or } (0,0)
a = b = c = \frac{1}{3} <- (\frac13,\frac13,\frac13) ;; a=b=c=1/3
n = 2^k, k \in \mathbb{N} <- n=2^k ;; 2^k \text{ for } k \in \mathbb{N} ;; n = 2^m, m\in\mathbb{N}
\text{all odd } n <- odd n ;; all odd n
\text{all primes} <- primes ;; all primes
n \ge 3 <- \text{all } n \ge 3 ;; \text{all integers } n\ge3
m \neq 0 \text{ and } m < 1 <- m<1, m\ne0 ;; (-\infty,0)\cup(0,1) ;; m<1 \text{ and } m\neq 0
x = -1 <- x+1=0 ;; -1
a_n = 2n - 1 <- a_k = 2k - 1 ;; 2n-1
A \cup B = \{1,2,3\} <- \{1,2,3\} ;; \{3,2,1\}
②③ <- ②, ③ ;; ②③
\text{①④} <- ①, ④ ;; ①④
3 \text{ m/s}^2 <- 3\text{ m s}^{-2} ;; 3
1\frac{2}{3}\text{ hours} <- 1 hour 40 minutes ;; \frac53
100\text{ minutes} <- 1 hour 40 minutes ;; 100
3 \text{ feet } 6 \text{ inches} <- 3.5 \text{ feet} ;; 42 inches
\text{7 minutes and 30 seconds} <- 7.5 minutes ;; 450 seconds
\mathbb{Z}/2\mathbb{Z} <- \mathbb{Z}_2 ;; \mathbb{Z}/2\mathbb{Z}
\mathbb{Z} \oplus \mathbb{Z}_2 <- \mathbb{Z}_2 \oplus \mathbb{Z}
\mathbb{Z} \oplus \mathbb{Z}_2 <- \mathbb{Z}\oplus \mathbb{Z}/2\mathbb{Z}
O(n \log n) <- \mathcal{O}(n\log n) ;; O(n\log n)
\Gamma\left(\frac{1}{2}\right) <- \sqrt{\pi} ;; \Gamma(1/2)
\nabla f = (2x, 2y) <- 2x\mathbf{i}+2y\mathbf{j} ;; (2x,2y)
\frac{dy}{dx} = \frac{2x}{3y^2} <- y' = \frac{2x}{3y^2} ;; \frac{2x}{3y^2}
y = Ce^{2x} <- y(x) = C e^{2x} ;; y=ce^{2x}
y = C_1 e^{x} + C_2 e^{-x} <- y = c_1 e^x + c_2 e^{-x} ;; y(x) = C_1 e^{x} + C_2 e^{-x}
u(x,t) = e^{-t}\sin x <- u = e^{-t}\sin x ;; e^{-t}\sin x
\frac{\hbar}{2} <- \hbar/2 ;; \frac{\hbar}{2}
1.00 \times 10^{-7} \text{ M} <- 10^{-7} ;; 1e-7
\overline{z} <- \bar{z} ;; \overline{z}
10^{-3}\ \Omega <- 0.001 ;; 10^{-3}
\text{No} <- No, it diverges ;; \text{No, because the limit is infinite}
\text{True} <- True, by compactness ;; true
3\text{ R }2 <- 3 r 2 ;; 3\text{ remainder }2
\text{C and D} <- CD ;; C, D
\vec{a} + 2\vec{b} <- 2\vec{b}+\vec{a} ;; \vec{a}+2\vec{b}
x = 2 + t, y = 3 - t <- y=3-t, x=2+t ;; (2+t, 3-t)
0 <- zero ;; \text{zero}
A = 3, B = -2 <- B=-2, A=3 ;; (3,-2)
\sqrt{2} <- 1.414214 ;; 1.414213
\text{(i) } 3 \text{ (ii) } 5 <- \text{(i) } 3 \text{ (ii) } 5 ;; (i) 3 (ii) 5
9 \text{ or } 10 <- 9, 10 ;; 10 or 9
\lfloor \log_2 n \rfloor + 1 <- 1+\lfloor\log_2 n\rfloor ;; \lfloor \log_2 n\rfloor+1
2^{\aleph_0} <- 2^{\aleph_0}
\operatorname{Re}(z) > 0 <- \text{Re}(z)>0 ;; \Re(z) > 0
\angle A = 40^\circ, \angle B = 60^\circ <- 40^\circ, 60^\circ
\angle A = 40^\circ, \angle B = 60^\circ <- \angle B = 60^\circ, \angle A = 40^\circ
\frac{x-1}{2} = \frac{y+2}{3} = \frac{z}{4} <- \frac{x-1}{2}=\frac{y+2}{3}=\frac{z}{4}
\frac34, \frac12 <- \frac34 \approx 0.75 \text{ or } \frac12 \approx 0.5
x \ne 3, x \ne 4 <- (-\infty,3)\cup(3,4)\cup(4,\infty) ;; \mathbb{R}\setminus\{3,4\}
\cos t\mathbf{i} + \sin t\mathbf{j} <- (\cos t, \sin t) ;; \langle \cos t, \sin t \rangle
\text{No} <- No, it is not linear ;; No, it does not converge
x = \frac{y-1}{2} = \frac{z}{3} <- x = \frac{y-1}{2} = \frac{z}{3}
7 <- m+n = 7 = x ;; 3+4 = 7 = x ;; x = y = 7
2ab <- S = ab+ab = 2ab ;; ab+ab = 2ab = S
\lfloor \frac{m}{n} \rfloor + 1 <- 1+\lfloor m/n \rfloor
\binom{m}{n} <- \frac{m!}{n!(m-n)!} ;; \binom{m}{m-n}
\frac{m!}{(m-n)!} <- n!\binom{m}{n}
x > 2 \text{ and } x < 5 <- (2,5) ;; 2 < x < 5
y = 1, x = 2 <- (2,1) ;; x = 2, y = 1 ;; (x,y) = (2,1) ;; \begin{pmatrix} 2 \\ 1 \end{pmatrix}
|x| < 2 <- (-2,2) ;; -2 < x < 2
5 feet 3 inches <- 63 inches tall ;; 5.25 feet ;; 63
\{\emptyset\} <- \{\varnothing\} ;; \{\{\}\}
2abc <- 2 \cdot a \cdot b \cdot c
3 <- three hours ;; \text{three dogs} ;; 3cats
0:3:4 <- 0:6:8
5000000 <- 5 Million ;; five million dollars
-7 <- negative seven ;; \text{-}7
(0,\infty) <- \mathbb{R}^+ ;; \mathbb{R}_{>0}
\{a,b,c\} <- c, a, b
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&2\cr3&4\end{pmatrix}
\binom{n}{k} <- C(n,k)
120 <- C(10,3)
\tan x <- \operatorname{tg} x ;; \tg x
(-1,3) <- |x-1|<2 ;; 2 > |x - 1|
\arcsin\frac{\sqrt3}{2} <- 60^\circ
\frac{\pi}{6} <- 30^\circ ;; 30\text{ degrees}
60^\circ <- \frac{\pi}{3} ;; \frac{\pi}{3}\text{ rad}
n \equiv 1,4 \pmod 5 <- n \equiv \pm 1 \pmod 5 ;; n ≡ 4 or 1 (mod 5)
\text{parallelogram} <- parallelograms
\frac{1}{2} <- frac{1}{2}
m=4,n=6 <- (m,n)=(4,6) ;; n=6, m=4 ;; (4,6)
(4,6) <- (n,m)=(4,6)
(1,2) <- \begin{aligned}x&=1\\y&=2\end{aligned}
2 <- \sqrt[3]{7+5\sqrt2}+\sqrt[3]{7-5\sqrt2}
\frac{\pi}{2}-\arctan\frac12 <- \arctan 2
\frac{1+i\sqrt3}{2} <- e^{i\pi/3}
"""

WRONG = r"""
x=1,y=2 <- a=1,b=2 ;; x=1,z=2
m=4,n=6 <- (n,m)=(4,6) ;; p=4,q=6
(m,n)=(4,6) <- (n,m)=(4,6) ;; m=6, n=4
1 <- \tanh 40 ;; \tanh 1000 ;; 1-e^{-100} ;; \cos(10^{-20}) ;; \sec(10^{-12}) ;; \coth 50
1 <- \frac{2}{\pi}\arctan(10^{30}) ;; \frac{\sin 10^{-15}}{10^{-15}} ;; \frac{1}{1+e^{-200}}
0 <- 1-\tanh 30 ;; e^{-10^3} ;; \sin(10^{-30})
10^{20} <- \sqrt{10^{40}+1}
\frac{\pi}{2} <- \arcsin(1-10^{-30}) ;; \frac{\pi}{2}\tanh 50
2abc <- 2abd ;; 2
2mg <- 2mgh
5 <- \begin{cases}\end{cases} ;; \begin{cases} \\ \end{cases} ;; \begin{cases}\end{cases} \pmod 2
x + 1 <- 0 \pmod 1
5 <- 0:0 ;; 0:00 ;; 0 to 0
\frac{3}{4} <- 0:00 ;; 0:0 ;; 0:4
3:4 <- 0:0 ;; 0:00 ;; (x-x):(y-y)
0:3:4 <- 0:9:9 ;; 0:0:0
200 <- two hundred five ;; two hundred thousand ;; Two Hundred Five
7 <- seven point five ;; seven less two
1 <- one in five ;; 1 out of five
5 <- 5 Million
60^\circ <- 60\text{ rad} ;; 60 radians
n \equiv 1,4 \pmod 5 <- n \equiv 1 \pmod 5 ;; n \equiv 1,4 \pmod 6
1/3 <- 0.333334 ;; 0.3333333334 ;; 0.33333 ;; 33.33\%
1 <- 1-e^{-30} ;; e^{10^{-12}} ;; 1-e^{-40} ;; 1-e^{-25} ;; \sqrt{1+10^{-14}} ;; e^{10^{-13}}
1 <- 1+\ln(1+10^{-12}) ;; \frac{e^{30}}{e^{30}+1}
0 <- \sqrt{2}-1.4142135623730950488 ;; e^{-40} ;; 10^{-40} ;; 2^{-60}
2 <- 2+e^{-35} ;; \sqrt{4+10^{-15}} ;; 1.\overline{98}
f(x) = \begin{cases} x & x \ge 0 \\ -x & x < 0 \end{cases} <- x ;; -x ;; f(x)=x ;; \pm x ;; -|x|
A = 3, B = -2 <- A = 3, C = -2 ;; A=-2, B=3 ;; (-2,3) ;; A=3
45.5^\circ <- 45^\circ 5' ;; 45^\circ ;; 45.3^\circ ;; 455^\circ
x = y = z = 2 <- x=y=2 ;; (2,2) ;; (2,2,3) ;; x = y = z = 3
\begin{cases} x^2 & x \le 1 \\ 2x-1 & x > 1 \end{cases} <- x^2 ;; 2x-1 ;; x^2, 2x-1
\begin{cases} x^2 & x \le 1 \\ 2x-1 & x > 1 \end{cases} <- \begin{cases} x^2 & x \le 1 \end{cases}
\begin{cases} x^2 & x \le 1 \\ 2x-1 & x > 1 \end{cases} <- x \le 1
\begin{cases} 1 & n \text{ even} \\ 0 & n \text{ odd} \end{cases} <- 1 ;; 0,1
[2, 5) \cup (5, \infty) <- [2,\infty)\setminus\{4\} ;; x\ge 2 ;; x \ne 5 ;; x > 2, x\ne 5
\mathbb{R} <- \mathbb{Z} ;; \mathbb{Q} ;; \mathbb{R}^+ ;; \mathbb{R}\setminus\{0\}
\mathbb{Z} <- \mathbb{R} ;; \mathbb{Z}^+ ;; \mathbb{N} ;; \mathbb{Q}
2\mathbf{i} + \mathbf{j} - \mathbf{k} <- 2\hat{i}-\hat{j}+\hat{k} ;; (2,1,1) ;; (2,1) ;; 2+1-1
\sqrt{2} <- 1.41421357 ;; 1.414215 ;; 1.41421 ;; 1.414212
262537412640768744 <- e^{\pi\sqrt{163}} ;; 262537412640768743 ;; 2.62537412640768744\times 10^{16}
\frac{1}{e} <- 0.367880 ;; 0.3678 ;; e
p=3,q=2 \text{ or } p=2,q=3 <- p=3,q=3 \text{ or } p=2,q=2 ;; p=3,q=2 ;; (3,2) ;; 2,3
\text{(i) } 3 \text{ (ii) } 5 <- \text{(i) } 5 \text{ (ii) } 3 ;; 3 ;; 5 ;; 15
9 \text{ or } 10 <- 9:10 ;; 9 ;; 10 ;; 9.5
x = 0, y = 0 \text{ or } x = 3, y = 3 <- x=0,y=3 \text{ or } x=3,y=0 ;; (0,3),(3,0) ;; (0,0)
x = 0, y = 0 \text{ or } x = 3, y = 3 <- x=0 \text{ or } x=3
a = b = c = \frac{1}{3} <- a=b=\frac13 ;; a=b=c=1 ;; (\frac13,\frac13) ;; (\frac13,\frac13,\frac23)
n = 2^k, k \in \mathbb{N} <- 2k ;; k^2 ;; n=2^{k+1} ;; n = 3^k ;; 2
\lfloor \log_2 n \rfloor + 1 <- \lceil\log_2 n\rceil ;; \lfloor\log_2 n\rfloor ;; \log_2 n+1
\lfloor \log_2 n \rfloor + 1 <- \lfloor\log_3 n\rfloor+1
m \neq 0 \text{ and } m < 1 <- m<1 ;; m\ne 0 ;; m \le 1, m\ne 0 ;; (0,1) ;; m<1 \text{ or } m\ne 0
m \neq 0 \text{ and } m < 1 <- m<1, m\ne \frac12
5 <- \begin{cases} 5 & x>0 \\ 6 & x \le 0 \end{cases} ;; 5^\circ 30' ;; a=b=5, c=4 ;; \{5, \pm 1\}
2^{\aleph_0} <- \aleph_0 ;; 2^{\aleph_1} ;; \aleph_1 ;; 2 ;; \infty
\mathbb{Z}/2\mathbb{Z} <- \mathbb{Z}/3\mathbb{Z} ;; \mathbb{Z} ;; 2\mathbb{Z} ;; \mathbb{Z}_3
\mathbb{Z}/2\mathbb{Z} <- \frac12
\mathbb{Z} \oplus \mathbb{Z}_2 <- \mathbb{Z}\oplus\mathbb{Z}_3 ;; \mathbb{Z} ;; \mathbb{Z}_2
\mathbb{Z} \oplus \mathbb{Z}_2 <- \mathbb{Z} \oplus \mathbb{Z}
\operatorname{Re}(z) > 0 <- \text{Im}(z)>0 ;; z>0 ;; \text{Re}(z)<0 ;; \text{Re}(z)\ge0
\frac{\hbar}{2} <- \hbar ;; \frac{h}{2} ;; \frac{1}{2} ;; 2\hbar ;; \frac{\hbar}{4}
\overline{z} <- z ;; -z ;; |z| ;; \overline{w} ;; \overline{z}^2
3\text{ R }2 <- 2 R 3 ;; 3 R 1 ;; 32 ;; 6
\text{C and D} <- C or D ;; C ;; D ;; B and D
\angle A = 40^\circ, \angle B = 60^\circ <- \angle A = 60^\circ, \angle B = 40^\circ
\angle A = 40^\circ, \angle B = 60^\circ <- 60^\circ, 40^\circ ;; 40^\circ ;; 100^\circ
\vec{a} + 2\vec{b} <- \vec{a}-2\vec{b} ;; 2\vec{a}+\vec{b} ;; \vec{a} ;; 3
\frac{x-1}{2} = \frac{y+2}{3} = \frac{z}{4} <- \frac{x-1}{2}=\frac{y-2}{3}=\frac{z}{4}
\frac{x-1}{2} = \frac{y+2}{3} = \frac{z}{4} <- \frac{z}{4} ;; x=1 ;; \frac{x-1}{2}=\frac{y+2}{3}
21 <- twelve ;; twenty ;; 20 1 ;; 2, 1
(-\infty, -2] \cup [5, \infty) <- [-2,5] ;; -2 \le x \le 5 ;; x \le -2 \text{ and } x\ge 6
(-\infty, -2] \cup [5, \infty) <- (-\infty,-2)\cup(5,\infty)
(-2, 3) \cup (3, \infty) <- (-2,\infty) ;; x>-2 ;; x\ne 3 ;; (-2,3)
(0, 0, 5) <- (0,5) ;; (5,0,0) ;; 5 ;; 005
\mathbf{i} - 2\mathbf{j} + 3\mathbf{k} <- \mathbf{i} + 2\mathbf{j} + 3\mathbf{k} ;; (1,2,3)
\mathbf{i} - 2\mathbf{j} + 3\mathbf{k} <- (1,-2) ;; 1-2+3
\begin{pmatrix} 3 \\ -4 \end{pmatrix} <- \begin{pmatrix} 3 & -4 \end{pmatrix}
\begin{pmatrix} 3 \\ -4 \end{pmatrix} <- \begin{pmatrix} -3 \\ 4 \end{pmatrix}
\begin{pmatrix} 3 \\ -4 \end{pmatrix} <- \begin{pmatrix} 3 \\ -4 \\ 0\end{pmatrix}
3n^2 + n <- 3n^2 - n ;; n(3n+2) ;; 3n+n^2 ;; 4n^3
f(x) = x + 1 \text{ and } f(x) = -x <- f(x)=x+1 ;; f(x) = -x ;; f(x)=x+1, f(x)=x
f(x) = cx <- f(x) = x ;; f(x)=c ;; f(x)=cx+d ;; f(x) = c/x
x = 4 <- y=4 ;; x=-4 ;; x+4=0 ;; x\ne 4
\text{Saturday} <- Sunday ;; Saturday or Sunday ;; not Saturday ;; Monday
\text{Yes} <- No ;; not yes ;; Yes or no ;; yes and no
\text{Infinitely many} <- none ;; 0 ;; finitely many ;; 1
\text{all positive integers} <- all integers ;; all positive even integers
\text{all positive integers} <- all positive real numbers ;; all negative integers
\text{Alice and Bob} <- Alice ;; Bob ;; Alice and Carol ;; Alice, Bob and Carol
\text{(D)} <- B ;; (A) ;; (D) and (E) ;; D or E
ACD <- AC ;; ACDE ;; CDA ;; ABD
15 <- 51 ;; １６ ;; 十六 ;; 15万
2023 <- 2023 BC and 5 ;; 2024 ;; 20 23 ;; 2,023,000
n \equiv 1 \pmod{4} <- n\equiv 1 \pmod{2} ;; n\equiv 3\pmod 4 ;; n \equiv 1 \pmod 8 ;; 4
\binom{20}{10} <- \binom{10}{20} ;; 20! ;; \frac{20}{10} ;; \binom{20}{9}
\{-1, 0, 1\} <- \{-1,1\} ;; [-1,1] ;; -1<x<1 ;; \pm 1
\frac{\pi}{6} + 2k\pi, k \in \mathbb{Z} <- \frac{\pi}{6} ;; \frac{\pi}{6}+k\pi
\frac{\pi}{6} + 2k\pi, k \in \mathbb{Z} <- \frac{\pi}{3}+2k\pi ;; -\frac{\pi}{6}+2k\pi
f(x) = 2x + 1 <- 2x-1 ;; x+1 ;; f(x)=x+2 ;; f(x)=2x
3.5 <- 3 hours 50 minutes ;; 3 hours 5 minutes ;; 3 hours ;; 30 minutes
210 <- 2 hours 10 minutes ;; 3 hours 30 seconds ;; 3 hours ;; 30
63 <- 6 feet 3 inches ;; 5 feet 13 inches ;; 5.3
f(x) = 0 \text{ and } f(x) = x <- f(x)=x ;; f(x)=0 ;; f(x) = 0, f(x)=-x ;; f(x)=x, f(x)=1
(1, 1, 1) <- a=b=c=2 ;; a=b=1 ;; 1 ;; a=b=c
(-\infty, -3) \cup (-3, 3) \cup (3, \infty) <- x\ne 3 ;; (-3,3) ;; \mathbb{R} ;; x = \pm 3
(-\infty, 0) \cup (4, \infty) <- \mathbb{R}\setminus(0,4) ;; \mathbb{R}\setminus\{0,4\} ;; [0,4]
(-\infty, 0) \cup (4, \infty) <- (0,4)
\frac{\pi}{3} + k\pi, k\in\mathbb{Z} <- \frac{\pi}{3}+2k\pi ;; \frac{\pi}{3}
\frac{\pi}{3} + k\pi, k\in\mathbb{Z} <- \frac{\pi}{6}+k\pi, k\in\mathbb{Z}
\frac{\pi}{3} + k\pi, k\in\mathbb{Z} <- \frac{\pi}{3}+k, k\in\mathbb{Z}
x \equiv 2 \pmod{5} <- x = 5k+3 ;; 5k ;; x = 10k+2 ;; x\equiv 2 \pmod{10}
\frac{1}{3}(2\mathbf{i}-\mathbf{j}+2\mathbf{k}) <- (2,-1,2) ;; \frac13
\frac{1}{3}(2\mathbf{i}-\mathbf{j}+2\mathbf{k}) <- \left(\frac23,\frac13,\frac23\right) ;; 1
\text{No} <- Yes ;; not no ;; None ;; N
\text{True} <- False ;; not true ;; T or F ;; untrue
\text{red and blue} <- red or blue ;; red ;; red and green ;; red, blue and green
\infty <- -\infty ;; 0 ;; finite ;; \text{does not exist}
12:00 \text{ a.m.} <- noon ;; 12:00 PM ;; 12 ;; 1:00 a.m.
75 <- seventy ;; seventy-six ;; fifty-seven ;; seven-five
(3, 0), (-3, 0) <- (3,0) ;; (0,3),(0,-3) ;; (0,\pm3) ;; \pm3
\frac{x+2}{x-3}, x \ne 3 <- \frac{x-2}{x-3} ;; \frac{x+2}{x+3}, x\ne -3 ;; \frac{x+2}{x-3}, x\ne -2
\frac{x+2}{x-3}, x \ne 3 <- x \ne 3
\ln(1+\sqrt{2}) <- \ln 1+\ln\sqrt2 ;; \ln(1-\sqrt2) ;; \ln\sqrt{3} ;; 1+\sqrt2
(x, y) = (1, 2), (2, 1) <- x=1,y=2 ;; (1,2) ;; (1,1),(2,2) ;; x=1,y=1; x=2,y=2
\text{all odd } n <- all even n ;; all n ;; no odd n ;; odd primes
\text{all primes} <- all odd primes ;; composites ;; no primes ;; all integers
n \ge 3 <- n\ge 2 ;; n\le 3 ;; n=3 ;; 3
x = -1 <- x=1 ;; y=-1 ;; x-1=0 ;; y+1=0
a_n = 2n - 1 <- 2n+1 ;; a_n=2n ;; a_n = n^2 ;; 2^n-1
A \cup B = \{1,2,3\} <- \{1,2\} ;; \{1,2,3,4\} ;; 6 ;; (3,2,2)
②③ <- ②④ ;; ③ ;; ①②③ ;; ②
1\frac{2}{3}\text{ hours} <- 1 hour 20 minutes ;; 1.23 ;; \frac23 ;; 1 hour 2 minutes
100\text{ minutes} <- 1 hour 4 minutes ;; 1 hour ;; 1.4 hours ;; 10 minutes
3 \text{ feet } 6 \text{ inches} <- 36 inches ;; 3.6 feet ;; 6 feet 3 inches ;; 9
\text{7 minutes and 30 seconds} <- 7.3 minutes ;; 30 seconds ;; 7 minutes ;; 37
O(n \log n) <- O(n) ;; O(n^2) ;; O(\log n) ;; n\log n^2
\Gamma\left(\frac{1}{2}\right) <- \pi ;; \frac12 ;; \Gamma(2) ;; \Gamma(\frac13)
\nabla f = (2x, 2y) <- (2y,2x) ;; 2x+2y ;; (x,y) ;; (2x,-2y)
\frac{dy}{dx} = \frac{2x}{3y^2} <- \frac{3y^2}{2x} ;; -\frac{2x}{3y^2} ;; \frac{2x}{3y}
\frac{dy}{dx} = \frac{2x}{3y^2} <- \frac{2}{3}
y = Ce^{2x} <- y=e^{2x} ;; y=Ce^{x} ;; y = C+e^{2x} ;; y=Ce^{-2x}
y = C_1 e^{x} + C_2 e^{-x} <- y=C_1e^x ;; C_1e^{2x}+C_2e^{-x} ;; e^x+e^{-x}
y = C_1 e^{x} + C_2 e^{-x} <- y = C_1\cos x+C_2\sin x
u(x,t) = e^{-t}\sin x <- e^{t}\sin x ;; e^{-t}\cos x ;; \sin x ;; e^{-x}\sin t
x = 2 + t, y = 3 - t <- (2-t,3+t) ;; (3-t,2+t) ;; (2,3) ;; x=2+t
\frac34 <- \frac34 \approx 0.75 \text{ or } \frac12 ;; \frac34 \approx 0.75 \text{ or } 1
x \ne 3, x \ne 4 <- (-\infty,3)\cup(3,\infty) ;; x \ne 3
(-\infty,3) \cup (3,\infty) <- x \ne 3, x \ne 4 ;; \mathbb{R}\setminus\{3,4\}
\frac{x}{2} = y = z <- y ;; z ;; \frac{x}{3} = y = z
x = \frac{y-1}{2} = \frac{z}{3} <- x = \frac{y+1}{2} = \frac{z}{3} ;; \frac{z}{3}
\frac{x-1}{2} = \frac{y}{3} = z <- \frac{x+1}{2} = \frac{y}{3} = z ;; \frac{y}{3} ;; z
y = 1, x = 2 <- (1,2) ;; \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; (x,y) = (1,2)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} <- 1 < x < 2 ;; 1 \le x \le 2
x > 2 \text{ and } x < 5 <- 2, 5 ;; 2 ;; x = 2, x = 5
|x| < 2 <- -2, 2 ;; \pm 2
1 \pmod 4 <- 4|k|+1 ;; 4k(k-1)(k-2)+4k+1 ;; 4k+k(k-1)(k-2)/2+1
(1,1) <- \mathbf{i}^2+\mathbf{j}^2 ;; |\mathbf{i}|+|\mathbf{j}| ;; \sqrt{\mathbf{i}}+\mathbf{j}
(0,0) <- \mathbf{i}\mathbf{j}
5 feet 3 inches <- 63 cm ;; 5.25 yards ;; 63 pounds
52_8 <- 52_8 = 52_9 ;; 42_{10} = 52_9
a + c <- 2b ;; b ;; a + b
x + y + z = 0 <- x - y + z = 0 ;; y = 0 ;; 3y = 0 ;; x - 2y + z = 0
a^2 + b^2 + c^2 <- a^2 + b^2 + (2b-a)^2
\lfloor \frac{a}{y} \rfloor <- 0 ;; 2\lfloor \frac{a}{y} \rfloor ;; \lfloor \frac{2a}{y} \rfloor
\lceil \frac{n}{3} \rceil <- \lfloor \frac{n}{3} \rfloor + 1 ;; \lfloor \frac{n}{3} \rfloor
\lceil \frac{m}{n} \rceil <- \lfloor \frac{m}{n} \rfloor + 1 ;; \lfloor \frac{m}{n} \rfloor
n <- n + \binom{m}{n} ;; n + \binom{k}{n}
\binom{m}{n} <- 0 ;; 2\binom{m}{n} ;; \binom{m}{n+1} ;; \binom{n}{m}
101_2 <- 101_{10} = 101_2
\emptyset <- \{\emptyset\} ;; \{\{\}\}
25 <- 25 (incorrect) ;; 25 (at most) ;; 25 (when n is even)
\text{Yes} <- Yes, when n is even ;; Yes, provided n is odd ;; Yes, sometimes
C <- C. 12, D. 13 ;; C) 12; D) 13
"""
RIGHT_TEXTS = r"""
6 <- The answer is 5. Wait, it is 6. ;; The answer is $5$. Actually, it should be $6$.
6 <- The answer is 5. Sorry, it's 6 apples. ;; **Answer: 5** Correction: **6**
7 <- The answer is 5. Wait, it is 6. No, it is 7.
5 <- The answer is 5. Wait, there are 6 apples in each bag. So 5 is right.
5 <- The answer is 5. Wait, let me check: 2 + 3 = 5. ;; The answer is 5. No 7 is needed.
5 <- The answer is $5$. Actually, $5 > 4$. ;; The answer is 5. No. 7 is wrong.
5 <- The answer is 5. Actually, 3 of these 5 are red.
6 <- The answer is 5. Wait, I forgot zero, so it is 6. ;; The answer is 5. Actually the total is 6.
\frac{1}{2} <- The answer is $\frac13$. Hmm, wait, that's $\frac12$.
3, 5 <- $x = \boxed{3}$ and $y = \boxed{5}$ ;; \boxed{3}\ \text{and}\ \boxed{5}
\frac{1}{2} <- \boxed\frac{1}{2} ;; \boxed\frac12
42 <- the answer is forty-two ;; <ANSWER>42</ANSWER> ;; 所以一共有42个苹果。 ;; 所以他有42元钱。
42 <- 答：一共有42个。 ;; The final answer is boxed{42}. ;; $boxed{42}$
42 <- ```python¶print("\\boxed{41}")¶```¶The answer is 42.
42 <- Running it prints 42, so the answer is 42.¶```python¶print(41 + 1)¶```
B <- B ;; I choose B. ;; 故选B。 ;; 故选：B ;; 答案选B ;; Thus, B is correct.
\frac{3}{4} <- The answer is $\frac{3}{4}$, or 75%. ;; The answer is $\frac{3}{4}$.
5 <- <final>5</final> ;; So the answer should be $5$, not $6$.
(3, 4) <- $x = \boxed{3}$, $y = \boxed{4}$ ;; $x=\boxed{3}$ and $y=\boxed{4}$
C <- C. 12 ;; Hence, option C. ;; The correct answer is option C: 12 ;; I would choose (C). ;; [C]
C <- 选C ;; 所以选C。 ;; 因此选择C。
"""
WRONG_TEXTS = r"""
5 <- The answer is 5. Wait, it is 6.
6 <- The answer is 5. Wait, it is 6 or 7.
6 <- The answer is 5. Wait, it is 6. No, it is 7.
6 <- The answer is 5. Wait, there are 6 apples in each bag. So 5 is right.
6 <- The answer is 5. Wait, it is 6, 7 or 8.
6 <- The answer is 5. Wait, it is not 6. ;; The answer is 6... no, -6.
(3, 4) <- The answer is 3 or 4. ;; The point is $(4, 3)$. ;; x=4, y=3
(3, 4) <- $x = \boxed{4}$, $y = \boxed{3}$
42 <- ```python¶print("\\boxed{42}")¶```¶The answer is 41. ;; The answer is 41, not 42.
42 <- The answer is not 42 ;; 42 is not the answer; the answer is 43.
3, 5 <- The roots are $\boxed{3}$. The other is 5. ;; $\boxed{3}$
3, 5 <- $\boxed{3}$ and $\boxed{4}$ and $\boxed{5}$ ;; \boxed{35}
\frac{1}{2} <- \boxed{\frac{1} ;; \boxed{\frac{1}{ ;; \boxed{1} ;; \boxed{\frac{1}{2}
B <- The answer is (A). ;; The answer is A, B. ;; Options A and B are both correct.
B <- The answer is not B.
\frac{3}{4} <- The answer is $\frac{4}{3}$. ;; The answer is 3 or 4. ;; The answer is 3.
\frac{3}{4} <- The answer is 4.
5 <- $x^5 = 1$, so $x = 1$ ;; x = 5 or x = -5 ;; x = 5, 6 ;; x > 5
C <- The correct answer is A. ;; The answer is B or C. ;; C is wrong. The answer is B.
C <- The answer is not C.
5 <- 答案不是5 ;; 答案不等于5。
"""


@pytest.mark.parametrize(
    ("table", "form", "wanted"),
    [
        (RIGHT, "\\boxed{{{}}}", True),
        (WRONG, "\\boxed{{{}}}", False),
        (RIGHT_TEXTS, "{}", True),
        (WRONG_TEXTS, "{}", False),
    ],
    ids=["right", "wrong", "right texts", "wrong texts"],
)
def test_answers_of_these_kinds_are_decided_right(table: str, form: str, wanted: bool) -> None:
    decided = {(gold, text): decision(form.format(text), gold) for text, gold in cases(table)}
    assert [case for case, verdict in decided.items() if verdict is not wanted] == []
